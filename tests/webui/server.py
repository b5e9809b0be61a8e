"""The real server as a child process, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 120  # of a machine with much else to do


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``python -m webui`` on a free port of the loopback address.

    Use as a context manager, which ends it as Ctrl-C does.

    Attributes:
        started_s: seconds until it answered.
        log: file with what it prints; beside the data folder, as it works in that one's parent.
    """

    def __init__(self, data_dir: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"{data_dir.name}-{self.port}.log"
        begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "webui", "--port", str(self.port)),
                    *("--data-dir", str(data_dir), *arguments),
                ],
                cwd=data_dir.parent,
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_it_answers(begun + START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise
        self.started_s = time.monotonic() - begun

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, how: signal.Signals = signal.SIGINT, timeout_s: float = 60) -> int:
        """Ask it to end in order; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end in {timeout_s} s:\n{self.output}") from None

    def kill(self) -> None:
        """End it as ``kill -9`` does, alone: what it started goes on."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """End it and everything that it started, as ``kill -9`` does."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()

    def _wait_until_it_answers(self, limit: float) -> None:
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.output}")
            try:
                httpx.get(f"{self.url}/config", timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"does not answer:\n{self.output}")
