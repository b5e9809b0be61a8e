"""The thread that works on the queue of runs, one process at a time."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from webui import runner
from webui.database import Sessions
from webui.models import Job
from webui.paths import DataFolder
from webui.progress import ProgressBook

State = Literal["queued", "running", "stopping", "stopped", "interrupted", "failed", "done"]

POLL_S = 0.2
STOP_S = 600.0
"""How long a run may take to save after it was asked to stop: a step, and a checkpoint."""
CLOSE_S = 60.0
"""The same when the app itself ends."""

_log = logging.getLogger(__name__)


@dataclass
class _Watch:
    """Of the run at hand: whether the end of the app stopped it, and when it was asked to stop."""

    interrupted: bool = False
    asked: float | None = None


class Dispatcher:
    """Starts queued runs and books how they end; ``lock`` is held over every change of a state."""

    def __init__(
        self,
        folder: DataFolder,
        sessions: Sessions,
        before_start: Callable[[], object],
        on_done: Callable[[str], object],
    ) -> None:
        self.folder = folder
        self.sessions = sessions
        self.progress = ProgressBook(folder)
        self.lock = threading.RLock()
        self._before_start = before_start
        self._on_done = on_done
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def start(self) -> None:
        """Mark what a server left running as interrupted, and begin to work on the queue.

        A run that outlived its server is told to stop first, and the queue waits for it.
        """
        with self.sessions() as session:
            left = session.scalars(select(Job).where(Job.state.in_(("running", "stopping")))).all()
            orphans = [(job.id, runner.find_process(job.pid, job.pid_started)) for job in left]
        for job, process in orphans:
            if process is not None and runner.is_alive(process):
                self._set(job, state="stopping")
                runner.ask_to_stop(process.pid)
            else:
                self._book_orphan(job)
        living = [(job, p) for job, p in orphans if p is not None and runner.is_alive(p)]
        self._closing = False
        self._thread = threading.Thread(target=self._work, args=(living,), name="jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the run at hand, saving it, and end the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _set(self, id: str, **values: Any) -> None:
        with self.lock, self.sessions.begin() as session:
            session.execute(update(Job).where(Job.id == id).values(**values))

    # What follows runs in the thread.

    def _work(self, orphans: Iterable[tuple[str, psutil.Process]]) -> None:
        for id, process in orphans:
            end = time.monotonic() + STOP_S
            while runner.is_alive(process) and not self._closing:
                if time.monotonic() > end:
                    runner.kill(process.pid)
                time.sleep(POLL_S)
            if not runner.is_alive(process):  # else the next server finds it again
                _call(lambda id=id: self._book_orphan(id))
        while not self._closing:
            try:
                id = self._take()
                if id is not None:
                    self._run(id)
                    continue
            except Exception:  # a full disk, a locked database: the queue must go on
                _log.exception("the queue could not work; it tries again")
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _take(self) -> str | None:
        """The next run of the queue, marked as running."""
        with self.lock, self.sessions.begin() as session:
            job = next(iter(queued(session)), None)
            if job is None:
                return None
            job.state, job.started_at = "running", time.time()
            job.message = job.pid = job.pid_started = job.ended_at = None
            return job.id

    def _run(self, id: str) -> None:
        """Work on one run until it ends."""
        log = self.folder.of("logs", id, ".log")
        begin = log.stat().st_size if log.exists() else 0
        _call(self._before_start)
        process = self._begin(id)
        if process is None:
            return
        watch = _Watch()
        while process.poll() is None:
            _call(lambda: self._tend(id, process.pid, watch))
            self._wake.wait(POLL_S)
            self._wake.clear()
        self._book(id, process.returncode, watch.interrupted, begin)

    def _tend(self, id: str, pid: int, watch: _Watch) -> None:
        """Have a look at a run that works: is it to stop, and does it take too long to?"""
        if self._closing and not watch.interrupted:
            watch.interrupted = self._interrupt(id, pid)
        if watch.asked is None and self._state(id) == "stopping":
            watch.asked = time.monotonic()
        limit = CLOSE_S if self._closing else STOP_S
        if watch.asked is not None and time.monotonic() - watch.asked > limit:
            runner.kill(pid)

    def _begin(self, id: str) -> subprocess.Popen[bytes] | None:
        """Start the process, unless the run was stopped in the meantime."""
        with self.lock:
            with self.sessions() as session:
                job = session.get_one(Job, id)
            if job.state == "stopping" or self._closing:
                self._set(id, state="stopped" if job.state == "stopping" else "queued")
                return None
            if job.subject_id is None:
                self._end(id, "failed", "Its subject was deleted, so there are no photos to use.")
                return None
            photos = self.folder.of("subjects", job.subject_id) / "photos"
            # The place of the photos again, for the data folder may have been moved.
            argv = ("--resume", str(self.folder.of("runs", id)), "--data.subject", str(photos))
            latents = self.folder.of("latents", job.subject_id)
            log = self.folder.of("logs", id, ".log")
            try:
                process = runner.start(self.folder, latents, argv, log)
            except OSError as error:
                self._end(id, "failed", f"The run could not be started: {error}")
                return None
            self._set(id, pid=process.pid, pid_started=psutil.Process(process.pid).create_time())
            return process

    def _interrupt(self, id: str, pid: int) -> bool:
        """Ask a run to stop because the app ends, unless a person has asked before."""
        with self.lock:
            if self._state(id) != "running":
                return False
            self._set(id, state="stopping")
            runner.ask_to_stop(pid)
            return True

    def _book(self, id: str, code: int, interrupted: bool, begin: int) -> None:
        """How a run ended; ``begin``: where in the log its output starts."""
        asked = self._state(id) == "stopping"
        if code == 0:
            self._end(id, "done")
        elif code in (runner.INTERRUPTED, -signal.SIGTERM) or (asked and code == -signal.SIGKILL):
            self._end(id, "interrupted" if interrupted else "stopped")
        else:
            output = runner.read_log(self.folder.of("logs", id, ".log"), begin)
            self._end(id, "failed", runner.explain_failure(code, self._error(id), output))

    def _book_orphan(self, id: str) -> None:
        """How a run ended whose server had died: as its events tell."""
        last = self.progress.of(id).last
        if last is not None and last["event"] == "done":
            self._end(id, "done")
        elif error := self._error(id):
            self._end(id, "failed", runner.explain_failure(None, error, ""))
        else:
            self._end(id, "interrupted")

    def _end(self, id: str, state: State, message: str | None = None) -> None:
        self.progress.of(id)  # its last events, which nobody looks for afterwards
        ended = time.time()
        self._set(id, state=state, message=message, pid=None, pid_started=None, ended_at=ended)
        if state == "done":
            _call(lambda: self._on_done(id))

    def _error(self, id: str) -> str | None:
        """Message of the error that the run at hand ended with."""
        error = self.progress.of(id).error
        with self.sessions() as session:
            since = session.get_one(Job, id).started_at or 0.0
        return error[1] if error is not None and error[0] >= since - 0.01 else None

    def _state(self, id: str) -> str | None:
        with self.sessions() as session:
            return session.scalar(select(Job.state).where(Job.id == id))


def queued(session: Session) -> list[Job]:
    """The queued runs of all owners, next first."""
    return list(
        session.scalars(select(Job).where(Job.state == "queued").order_by(Job.position)).all()
    )


def is_working(sessions: Sessions, subject_id: str | None = None) -> bool:
    """Whether a run is at work: of anybody, or with the photos of one subject."""
    working = select(Job.id).where(Job.state.in_(("running", "stopping")))
    if subject_id is not None:
        working = working.where(Job.subject_id == subject_id)
    with sessions() as session:
        return session.scalar(working.limit(1)) is not None


def _call(hook: Callable[[], object]) -> None:
    """Call something whose fault must not end the queue."""
    try:
        hook()
    except Exception:
        _log.exception("something beside a run failed")
