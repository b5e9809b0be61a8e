"""Finished trials, kept in one file: no command repeats what another has measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from nora_diffusion.bench.trial import Trial, run_trial

Row = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")


class Ledger:
    """Rows of trials on one base, by one protocol.

    Args:
        file: all rows, one a line as JSON, those of other protocols among them; made if missing.
        work: work folder of mini's recipe.
        about: base and protocol; rows of another are not taken.
        sampling_steps: denoising steps of every picture.
        workers: processes that train side by side, one thread each.
    """

    def __init__(
        self, file: Path, work: Path, about: Row, sampling_steps: int, workers: int
    ) -> None:
        self.file, self.work, self.about = file, work, about
        self.sampling_steps, self.workers = sampling_steps, workers
        self._rows: dict[str, Row] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if row.pop("about") == about:
                self._rows[_name(row)] = row

    def find(self, trial: Trial) -> Row | None:
        """The row of a trial; None where there is none."""
        return self._rows.get(_name(trial.key))

    def run(self, trials: Sequence[Trial], on_row: Callable[[], None] = lambda: None) -> list[Row]:
        """Rows of all the trials, in their order; ``on_row`` is called after each new one."""
        left = [trial for trial in trials if self.find(trial) is None]
        if left:
            self._measure(left, on_row)
        return [self.row(trial) for trial in trials]

    def row(self, trial: Trial) -> Row:
        """The row of a finished trial."""
        row = self.find(trial)
        if row is None:
            raise KeyError(f"not measured: {trial.key}")
        return row

    def _measure(self, trials: Sequence[Trial], on_row: Callable[[], None]) -> None:
        # Fresh processes: torch takes its number of threads from the environment at the start.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, len(trials))
        pool = ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(self.work, self.sampling_steps)
        )
        with pool, tqdm(total=len(trials), unit="trial") as bar:

            def finished(trial: Trial, row: Row) -> None:
                self._write(trial, row)
                bar.update()
                on_row()

            side_by_side(pool, workers, _work, trials, finished)

    def _write(self, trial: Trial, row: Row) -> None:
        self._rows[_name(trial.key)] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**row, "about": self.about}).encode() + b"\n"
        with open(self.file, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, of a run that was killed
                    line = b"\n" + line
            file.write(line)  # one write: lines do not mix


def side_by_side(
    pool: Executor,
    workers: int,
    call: Callable[[T], R],
    items: Iterable[T],
    finished: Callable[[T, R], None],
) -> None:
    """Call with every item, ``workers`` at a time, and hand over each result as it comes.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once what was in progress has been handed over.
        Exception: of the first call that failed, likewise.
    """
    waiting, running = iter(items), dict[Future[R], T]()

    def start(count: int) -> None:
        # No more than there are workers: what a pool has queued cannot be taken back at a stop.
        with _interrupts_held():
            running.update((pool.submit(call, item), item) for item in islice(waiting, count))

    try:
        start(workers)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished(running.pop(future), future.result())
                start(1)
    except BaseException as stop:
        print(f"stopping ({type(stop).__name__}): what is in progress is finished", file=sys.stderr)
        for future in as_completed(list(running)):
            if future.exception() is None:
                with suppress(Exception):  # the first failure is the one that is told
                    finished(running[future], future.result())
        raise


@contextmanager
def _interrupts_held() -> Generator[None, None, None]:
    """Ctrl-C waits; a process started meanwhile never gets it, as it inherits the mask.

    A worker that is still importing would die of it and take the others with it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _name(row: Row) -> str:
    return json.dumps([row[key] for key in ("method", "subject", "learning_rate", "seed", "steps")])


_ruler: Any = None


def _start_worker(work: Path, sampling_steps: int) -> None:
    import torch

    from nora_diffusion.bench.ruler import Ruler

    global _ruler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which waits for us
    torch.set_num_threads(1)
    _ruler = Ruler(work, sampling_steps)


def _work(trial: Trial) -> Row:
    return run_trial(trial, _ruler)
