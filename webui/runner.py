"""One ``nora-dreambooth`` process: how it is started, ended, found again, and what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from webui.paths import DataFolder

COMMAND = (
    sys.executable,
    "-P",  # the working folder holds what people uploaded: nothing is imported from there
    "-c",
    "from nora_diffusion.cli import main_dreambooth; raise SystemExit(main_dreambooth())",
)
LOG_TAIL_BYTES = 64 * 1024
INTERRUPTED = 130
MEMORY_CURE = (
    "Choose a preset for less memory (8gb), a smaller data.resolution_px or train.batch_size, or "
    "train.gradient_checkpointing, and start a new run."
)

BASE_CURE = " Check the name, or give weights that are on this machine."


def start(folder: DataFolder, latents: Path, argv: Sequence[str], log: Path) -> subprocess.Popen:
    """Start the command in the data folder.

    Args:
        folder: the data folder.
        latents: folder for encoded photos.
        argv: arguments of ``nora-dreambooth``.
        log: file to append its output to.
    """
    with open(log, "ab", buffering=0) as output:
        shown = f"# {time.strftime('%Y-%m-%d %H:%M:%S')}: nora-dreambooth {' '.join(argv)}\n"
        output.write(shown.encode())
        return subprocess.Popen(
            [*COMMAND, *argv],
            cwd=folder.root,
            env=environment(folder, latents),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C in the server's terminal must not reach it beside our SIGTERM: a second
            # signal ends a run without a checkpoint.
            start_new_session=True,
        )


def environment(folder: DataFolder, latents: Path) -> dict[str, str]:
    """Variables of a run: everything it caches stays in the data folder."""
    return os.environ | {
        "NORA_CACHE_DIR": str(folder.part("cache")),
        "NORA_LATENTS_DIR": str(latents),
        "PYTHONUNBUFFERED": "1",  # the log is read while it is written
    }


def find_process(pid: int | None, started: float | None) -> psutil.Process | None:
    """The process of that number, if it is still the one that was started then."""
    if pid is None or started is None:
        return None
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - started) < 0.01 else None
    except psutil.Error:
        return None


def is_alive(process: psutil.Process) -> bool:
    """Whether it still works; one that waits for its exit code to be read does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def ask_to_stop(pid: int) -> None:
    """SIGTERM, once: it saves a checkpoint after the step at hand."""
    _signal(pid, signal.SIGTERM)


def kill(pid: int) -> None:
    """End a process that did not stop when asked."""
    _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def explain_failure(code: int | None, error: str | None, output: str) -> str:
    """A sentence on why a run failed, and what to change.

    Args:
        code: exit code; negative: the signal that ended it; None: not known.
        error: message of the ``error`` event that it wrote in this attempt, or None.
        output: the end of what it printed in this attempt.
    """
    if code == -signal.SIGKILL:
        return f"The system ended the run, most likely for want of memory. {MEMORY_CURE}"
    if code is not None and code < 0:
        return f"The run was ended by {signal.Signals(-code).name}; resume goes on with it."
    printed = output.rpartition("nora-dreambooth: error: ")
    told = (printed[2] if printed[1] else error or "").strip()
    if "out of memory" in output.lower() or "out of memory" in told.lower():
        return f"The GPU's memory is full. {MEMORY_CURE}"
    if told and "Traceback (most recent call last)" not in output:
        return told + (BASE_CURE if told.startswith("model.base = ") else "")
    last = told or next((line for line in reversed(output.splitlines()) if line.strip()), "")
    return (
        f"The run ended unexpectedly ({last.strip()[:300] or f'exit code {code}'}). The log has "
        "the details; a run with the settings of the base model as they are may tell whether a "
        "changed setting is the cause."
    )


def read_log(path: Path, start: int | None = None) -> str:
    """The end of a log as a terminal would show it: of a progress bar its last state.

    Args:
        path: the log; it may not exist yet.
        start: first byte, at most ``LOG_TAIL_BYTES`` before the end; None: as many as that.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = max(start or 0, size - LOG_TAIL_BYTES)
            file.seek(first)
            data = file.read(LOG_TAIL_BYTES)
    except FileNotFoundError:
        return ""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(lines))
