"""Pictures from one warm worker process, which keeps the last base and its adapters loaded."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nora_diffusion.config import UserError
from nora_diffusion.cores import spin_briefly
from webui.bases import bases, defaults
from webui.paths import DataFolder, new_id
from webui.protocol import (
    ORDER,
    PICTURES_AT_MOST,
    REPLY,
    STOP,
    Order,
    Reply,
    Request,
)

ADAPTERS_AT_MOST = 4
SIDE_AT_MOST_PX = 4096
_LOG_BYTES = 1_000_000
_CLOSE_S = 10.0

Progress = Callable[[float, str], object]
"""Told the share of a request that is done, from 0 to 1, and what is going on."""


@dataclass(frozen=True)
class Drawn:
    """What a request has given.

    Attributes:
        files: in ``pictures``, strength by strength.
        settings: of each file, as they stand inside it.
        sheet: the labelled grid, where there are several strengths.
        sheet_settings: as they stand inside it.
        notes: "device"; "safety_checker": whether the base has one; "warnings": sentences for the
            reader; "base_loads" and "adapter_loads": how many the worker has done; "switching_s":
            seconds spent on the base and the adapters, not on drawing; "seconds": all of it.
    """

    files: list[Path]
    settings: list[dict[str, Any]]
    sheet: Path | None = None
    sheet_settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class _WorkerDied(Exception):
    """The process ended in the middle of a request."""


class Sampler:
    """Client of the worker process; requests are answered one at a time, first come first."""

    def __init__(self, folder: DataFolder, is_training: Callable[[], bool] = lambda: False) -> None:
        """Nothing is started before the first request.

        Args:
            folder: the data folder.
            is_training: whether a training run is at work, which needs the GPU for itself.
        """
        self.folder = folder
        self._is_training = is_training
        # One thread, whose queue is the order in which requests are answered.
        self._turns = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._device = ""
        self._drawing_for: str | None = None
        self._closing = False

    def draw(self, request: Request, progress: Progress | None = None, owner: str = "") -> Drawn:
        """Wait for one's turn and draw.

        Args:
            request: what to draw.
            progress: called as it goes on.
            owner: who may ``stop`` it.

        Raises:
            UserError: what cannot be done, or that the request was stopped.
        """
        _check(request)
        if request.base in bases():
            request = dataclasses.replace(request, base=defaults(request.base).model.base)
        context = contextvars.copy_context()  # Gradio finds the page to tell by it
        turn = self._turns.submit(context.run, self._draw, request, progress, owner)
        return turn.result()

    def stop(self, owner: str = "") -> bool:
        """End the request at hand if it is this owner's, and say whether; the worker stays."""
        with self._lock:
            if self._drawing_for != owner or self._process is None:
                return False
            self._send(self._process, STOP)
            return True

    def prepare(self) -> None:
        """Start the worker if it is not there, so that the next request need not wait for that."""
        if self._process is None and not self._is_training():
            self._turns.submit(self._worker)

    def release(self) -> None:
        """Give the worker's memory back, after the request at hand; the next one starts it anew."""
        self._turns.submit(self._end).result()

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        self._closing = True
        self._turns.shutdown(wait=False, cancel_futures=True)
        process = self._process
        if process is not None:
            process.kill()
        self._turns.shutdown()
        self._end()

    # What follows runs in the one thread.

    def _draw(self, request: Request, progress: Progress | None, owner: str) -> Drawn:
        count = request.count + request.has_sheet
        files = tuple(self.folder.of("pictures", new_id(), ".png") for _ in range(count))
        order = Order(request, files)
        try:
            try:
                reply = self._ask(order, progress, owner)
            except _WorkerDied:  # once more: what killed it may have had another aim
                reply = self._ask(order, progress, owner)
            return _result(order, reply)
        except BaseException as error:
            for path in files:
                path.unlink(missing_ok=True)
            if isinstance(error, _WorkerDied):
                raise UserError(
                    f"the process that draws ended twice in the middle of this request ({error}); "
                    "it will be started again for the next one. With too little memory, draw fewer "
                    "or smaller pictures"
                ) from None
            raise

    def _ask(self, order: Order, progress: Progress | None, owner: str) -> Reply:
        """Have one order answered.

        Raises:
            _WorkerDied: when the process ended before it answered.
            UserError: when the GPU is taken.
        """
        if progress is not None and self._process is None:
            progress(0.0, "starting to draw")
        process = self._worker()
        if self._device != "cpu" and self._is_training():
            raise UserError(
                f"a training run is using the {self._device} device; draw again when it has ended"
            )
        with self._lock:
            self._drawing_for = owner
            self._send(process, ORDER.dump_json(order).decode())
        try:
            while True:
                reply = self._read(process)
                if reply.kind != "progress":
                    return reply
                if progress is not None:
                    progress(reply.done, reply.text)
        except BaseException:
            process.kill()  # or the next request would be answered with the rest of this one
            raise
        finally:
            with self._lock:
                self._drawing_for = None

    def _worker(self) -> subprocess.Popen[str]:
        """The process, started if it is not there."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        if self._closing:
            raise UserError("the app is ending")
        self._process = self._start()
        ready = self._read(self._process)
        self._device = str(ready.notes.get("device", "cpu"))
        return self._process

    def _start(self) -> subprocess.Popen[str]:
        path = self.folder.part("logs") / "worker.log"
        full = path.exists() and path.stat().st_size > _LOG_BYTES
        environment = os.environ | {"NORA_CACHE_DIR": str(self.folder.part("cache"))}
        spin_briefly(environment)  # a training run may be using the cores
        with open(path, "wb" if full else "ab") as log:
            return subprocess.Popen(
                # -P: the working folder holds what people uploaded, nothing is imported from it.
                [sys.executable, "-P", "-m", "webui.worker", str(self.folder.root)],
                cwd=self.folder.root,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the server, which ends this in order
            )

    def _send(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except OSError:  # it has just died, which reading will tell
            pass

    def _read(self, process: subprocess.Popen[str]) -> Reply:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            return REPLY.validate_json(line)
        except ValidationError:  # half a line, or none: it is dead or dying
            process.kill()
            code = process.wait()
            self._end()
            raise _WorkerDied(f"exit code {code}") from None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _result(order: Order, reply: Reply) -> Drawn:
    if reply.kind == "stopped":
        raise UserError("stopped; nothing was kept")
    if reply.kind == "failed":
        raise UserError(f"drawing failed ({reply.text}); logs/worker.log in the data folder has it")
    if reply.kind != "drawn":
        raise UserError(reply.text)
    count = order.request.count
    files, settings = list(order.files), list(reply.settings)
    sheet = (files[count], settings[count]) if order.request.has_sheet else (None, {})
    return Drawn(files[:count], settings[:count], *sheet, reply.notes)


def _check(request: Request) -> None:
    """Refuse what no base can draw; what this base cannot, the worker says.

    Raises:
        UserError: naming what to change.
    """
    if not request.n >= 1 or not request.strengths or request.count > PICTURES_AT_MOST:
        raise UserError(f"number of pictures: {request.count}; give 1 to {PICTURES_AT_MOST}")
    if len(request.adapters) > ADAPTERS_AT_MOST:
        raise UserError(f"{len(request.adapters)} adapters; choose at most {ADAPTERS_AT_MOST}")
    numbers = (
        request.guidance,
        *request.strengths,
        *(adapter.weight for adapter in request.adapters),
    )
    if not all(math.isfinite(number) for number in numbers):
        raise UserError("guidance and strengths: give finite numbers")
    try:
        f"{request.prompt}{request.negative_prompt}".encode()
    except UnicodeEncodeError:
        raise UserError("prompt: it holds characters that are no valid text") from None
    for name, side in (("width", request.width_px), ("height", request.height_px)):
        if side is not None and not 1 <= side <= SIDE_AT_MOST_PX:
            raise UserError(f"{name} = {side}: give 1 to {SIDE_AT_MOST_PX} px")
