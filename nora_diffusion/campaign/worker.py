"""What happens on the machine of a run; light, since every Ray worker imports it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nora_diffusion.events import read_events

POLL_S = 0.5
PREDECESSOR_S = 600
"""How long an attempt waits for one that is still saving after its Ray worker died."""

_CHILD = (
    "import sys; from nora_diffusion.campaign.worker import supervised; "
    "from nora_diffusion.cli import main_dreambooth; "
    "sys.exit(supervised(main_dreambooth, sys.argv[1], sys.argv[2:]))"
)


@dataclass(frozen=True)
class Job:
    """One attempt at a run; all paths are absolute, on a file system all machines share.

    Attributes:
        argv: arguments of ``nora-dreambooth``.
        cwd: folder to run it in, which relative paths in its settings start from.
        folder: the run folder.
        log: file to append its output to.
        lock: file whose lock the run holds.
        session: file that is there while the campaign goes on; without it runs save and stop.
    """

    argv: tuple[str, ...]
    cwd: Path
    folder: Path
    log: Path
    lock: Path
    session: Path


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Attributes:
        host: the machine.
        code: exit code of the process; None when the session was not there to begin with.
        seconds: how long it took.
        message: what went wrong, or None.
    """

    host: str
    code: int | None
    seconds: float
    message: str | None


def attempt(job: Job) -> Attempt:
    """Run ``nora-dreambooth`` once, to its end or until the session ends."""
    host = socket.gethostname()
    if not job.session.is_file():
        return Attempt(host, None, 0.0, None)
    if not job.cwd.is_dir():
        return Attempt(host, 2, 0.0, f"{job.cwd}: no such folder on {host}; start the campaign in "
                       "a folder of a file system that all machines share")  # fmt: skip
    started = time.time()
    with open(job.log, "ab", buffering=0) as log:
        shown = shlex.join(["nora-dreambooth", *job.argv])
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} on {host}: {shown}\n".encode())
        size = log.tell()
        command = [sys.executable, "-P", "-c", _CHILD, str(job.lock), *job.argv]
        # Leaving the block closes the child's standard input, which stops it, and waits for it.
        with subprocess.Popen(
            command, cwd=job.cwd, stdin=subprocess.PIPE, stdout=log, stderr=log
        ) as process:
            while process.poll() is None and job.session.is_file():
                time.sleep(POLL_S)
    code = process.returncode
    message = None if code == 0 else _failure(job, code, started, size)
    return Attempt(host, code, time.time() - started, message)


def _failure(job: Job, code: int, since: float, log_size: int) -> str:
    """A sentence on why the process ended: its error event, the end of its output, or its code."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    events = [event for event in read_events(job.folder / "events.jsonl") if event["time"] >= since]
    for event in reversed(events):
        if event["event"] == "error" and event["message"]:
            return event["message"]
    output = job.log.read_bytes()[log_size:].decode("utf-8", "replace").strip()
    error = output.rpartition("nora-dreambooth: error: ")
    last = error[2] if error[1] else output.rpartition("\n")[2]
    return last.strip() or f"exit code {code}; see {job.log}"


def supervised(main: Callable[[Sequence[str]], int], lock: str, argv: Sequence[str]) -> int:
    """Run a command as long as whoever holds the other end of standard input lives.

    A Ray worker that is killed leaves its process behind: the process then saves and stops, and
    the next attempt, which wants the same lock, waits for it.
    """
    from filelock import FileLock, Timeout

    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    try:
        with FileLock(lock, timeout=PREDECESSOR_S):
            return main(argv)
    except Timeout:
        print(f"nora-dreambooth: error: another process still works on this run ({lock})")
        return 1


def _stop_at_end_of_input() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be in the way at the exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
