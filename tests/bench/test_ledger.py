"""Trials side by side: what is finished is kept, also at a stop."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nora_diffusion.bench.ledger import Ledger, side_by_side
from nora_diffusion.bench.methods import nora
from nora_diffusion.bench.trial import Trial


def test_every_item_is_done_once_and_no_more_than_the_workers_at_a_time():
    lock, now, most, done = threading.Lock(), set(), [], {}

    def square(number: int) -> int:
        with lock:
            now.add(number)
            most.append(len(now))
        threading.Event().wait(0.005)
        with lock:
            now.remove(number)
        return number**2

    with ThreadPoolExecutor(8) as pool:  # more threads than are to be used
        side_by_side(pool, 3, square, range(20), done.__setitem__)
    assert done == {number: number**2 for number in range(20)}
    assert max(most) == 3


def test_a_stop_keeps_what_was_in_progress_and_starts_nothing_more():
    started, done = [], []

    def call(number: int) -> int:
        started.append(number)
        threading.Event().wait(0.02)
        return number

    def finished(number: int, result: int) -> None:
        done.append(result)
        if len(done) == 3:
            raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyboardInterrupt):
        side_by_side(pool, 2, call, range(50), finished)
    assert sorted(done) == sorted(started)
    assert len(started) < 10


def test_one_failure_loses_nothing_else():
    done = []

    def call(number: int) -> int:
        if number == 3:
            raise OSError("no space left")
        threading.Event().wait(0.01 * number)
        return number

    with ThreadPoolExecutor(3) as pool, pytest.raises(OSError, match="no space left"):
        side_by_side(pool, 3, call, range(3, 50), lambda _, result: done.append(result))
    assert done == [4, 5]  # what ran beside it, and nothing more


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", tmp_path, {"base": "x"}, 2, 1)
    trials = [Trial(nora(), subject, 1e-2, 0, 5) for subject in ("poodle", "cactus")]
    ledger._write(trials[0], {**trials[0].key, "gap_closed": 0.1})
    with open(ledger.file, "a") as file:
        file.write('{"method": "cut sho')
    ledger._write(trials[1], {**trials[1].key, "gap_closed": 0.2})
    again = Ledger(ledger.file, tmp_path, {"base": "x"}, 2, 1)
    assert [again.row(trial)["gap_closed"] for trial in trials] == [0.1, 0.2]
