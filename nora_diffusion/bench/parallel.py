"""Long calls side by side in workers; a stop or a failure loses nothing that is finished."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, as_completed, wait
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
