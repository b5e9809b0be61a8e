"""The ledger of finished trials."""

from nora_diffusion.bench.ledger import Ledger
from nora_diffusion.bench.methods import lora, nora
from nora_diffusion.bench.trial import Trial


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", tmp_path, {"base": "x"}, 2, 1)
    trials = [Trial(nora(), subject, 1e-2, 0, 5) for subject in ("poodle", "cactus")]
    ledger._write(trials[0], {**trials[0].key, "gap_closed": 0.1})
    with open(ledger.file, "a") as file:
        file.write('{"method": "cut sho')
    ledger._write(trials[1], {**trials[1].key, "gap_closed": 0.2})
    again = Ledger(ledger.file, tmp_path, {"base": "x"}, 2, 1)
    assert [again.row(trial)["gap_closed"] for trial in trials] == [0.1, 0.2]


def test_times_of_two_kinds_of_cpu_are_not_mixed(tmp_path):
    """The kind on which most methods were timed; of equals the one that was used last."""
    ledger = Ledger(tmp_path / "trials.jsonl", tmp_path, {"base": "x"}, 2, 1)
    one, other = nora(), lora("LoRA r 1", 1)

    def timed(method, subject, seconds, steps=5, **processor):
        trial = Trial(method, subject, 1e-2, 0, steps)
        ledger._write(trial, {**trial.key, "step_cpu_s": seconds, **processor})

    names = [one.name, other.name]
    timed(one, "poodle", 4.0)
    timed(other, "poodle", 2.0)
    timed(one, "cactus", 1.0, processor="fast")
    assert ledger.step_cpu_s(names, 5) == {one.name: 4.0, other.name: 2.0}
    timed(other, "cactus", 0.5, processor="fast")
    timed(other, "rooster", 0.7, processor="fast")
    assert ledger.step_cpu_s(names, 5) == {one.name: 1.0, other.name: 0.6}
    assert ledger.step_cpu_s([], 5) == {}
    # Nor trainings of another length, which are another study's.
    timed(one, "poodle", 9.0, steps=20, processor="fast")
    assert ledger.step_cpu_s(names, 5) == {one.name: 1.0, other.name: 0.6}
    assert ledger.step_cpu_s(names, 20) == {one.name: 9.0}
