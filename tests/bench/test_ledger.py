"""Trials side by side: what is finished is kept, also at a stop."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nora_diffusion.bench.ledger import side_by_side


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
