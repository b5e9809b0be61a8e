"""Calls side by side: what is finished is kept, also at a stop."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nora_diffusion.bench.parallel import side_by_side


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


COMMAND = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from nora_diffusion.bench.parallel import side_by_side

def tell(line):
    os.write(1, f"{line}\\n".encode())  # whole: print() is torn under PYTHONUNBUFFERED

def call(number):
    tell(f"started {number}")
    time.sleep(1.5)
    return number

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs with &
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with pool:
        side_by_side(pool, 2, call, range(9), lambda _, n: tell(f"finished {n}"))
"""


def test_ctrl_c_in_a_terminal_reaches_no_worker(tmp_path):
    """It is sent to the whole group: to calls in progress and to workers that are just starting."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines = iter(command.stdout.readline, "")
    seen = [next(lines).strip()]  # one is running, the other has perhaps not begun
    os.killpg(command.pid, signal.SIGINT)
    seen += [line.strip() for line in lines]
    told = command.communicate(timeout=60)[1]
    assert "stopping (KeyboardInterrupt)" in told and told.rstrip().endswith("KeyboardInterrupt")
    assert sorted(seen) == ["finished 0", "finished 1", "started 0", "started 1"]
