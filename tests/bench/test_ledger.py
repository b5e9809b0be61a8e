"""The ledger of finished trials."""

from nora_diffusion.bench.ledger import Ledger
from nora_diffusion.bench.methods import nora
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
