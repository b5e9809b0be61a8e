"""How much memory and time a run would take, before it is started.

Memory is what ``nora-dreambooth`` itself predicts. Time is that of earlier runs in this data
folder; where there are none, the built-in base is small enough to try a few steps of the very
settings.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select

from nora_diffusion.config import ConfigError, DreamboothConfig, load_run, save_config
from nora_diffusion.events import read_events
from nora_diffusion.families import built_in_version
from nora_diffusion.schema import get_key
from webui import runner
from webui.database import Sessions
from webui.dispatcher import is_working
from webui.models import Job
from webui.paths import DataFolder, new_id
from webui.progress import seconds_a_step

TRIED_STEPS = 4
LIMIT_S = 180.0
"""How long a forecast may take before it is given up."""
EARLIER = 20
"""Newest runs that are looked at."""
KEPT = 64
POLL_S = 0.2

WAITS = "The time is not known while another run is at work."

SPEED_KEYS = (
    "model.base", "model.dtype", "model.device", "model.quantize", "model.attention",
    "model.compile", "model.offload", "adapter.targets", "adapter.target_modules", "adapter.r",
    "text_encoder.train", "data.resolution_px", "data.buckets", "train.batch_size",
    "train.gradient_accumulation_steps", "train.optimizer", "train.prior",
    "train.gradient_checkpointing",
)  # fmt: skip
"""What the time of a step depends on."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it starts.

    Attributes:
        memory: lines with the predicted memory, the sum first; empty while not known.
        step_s: seconds a step, or None.
        origin: where ``step_s`` is from, or why there is none, in a sentence.
        ready: whether nothing more will be known.
    """

    memory: tuple[str, ...] = ()
    step_s: float | None = None
    origin: str = ""
    ready: bool = False


class Forecasts:
    """Makes forecasts in a thread, one at a time; of each owner's only the one asked for last."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions
        self._lock = threading.Condition()
        self._known: dict[str, Forecast] = {}
        self._wanted: dict[str, tuple[str, DreamboothConfig]] = {}
        self._closing = False
        self._thread: threading.Thread | None = None

    def ask(self, owner: str, config: DreamboothConfig) -> str:
        """Begin with a forecast, unless it is known; returns the key to ``get`` it by."""
        key = _key(config)
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            known = self._timed(key, known, config)
        with self._lock:
            if known is not None:
                self._wanted.pop(owner, None)
                return key
            self._wanted[owner] = key, config
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="forecast", daemon=True)
                self._thread.start()
            self._lock.notify()
        return key

    def get(self, key: str) -> Forecast | None:
        """What is known so far; None: nothing, and nobody works on it."""
        with self._lock:
            known = self._known.get(key)
            wanted = any(key == other for other, _ in self._wanted.values())
            return known or (Forecast() if wanted else None)

    def close(self) -> None:
        """End the thread and what it has started."""
        with self._lock:
            self._closing = True
            self._wanted.clear()
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def _timed(self, key: str, known: Forecast, config: DreamboothConfig) -> Forecast | None:
        """A forecast with what runs have told since; None: it is to be made anew."""
        step_s, origin = self._earlier(config)
        if step_s is None:
            return None if known.origin == WAITS and not is_working(self.sessions) else known
        with self._lock:
            self._known[key] = replace(known, step_s=step_s, origin=origin)
            return self._known[key]

    # What follows runs in the thread.

    def _work(self) -> None:
        for left in self.folder.part("cache").glob("forecast-*"):  # of a server that was killed
            shutil.rmtree(left, ignore_errors=True)
        while True:
            with self._lock:
                while not self._wanted and not self._closing:
                    self._lock.wait()
                if self._closing:
                    return
                owner, (key, config) = next(iter(self._wanted.items()))
            try:
                found = self._make(owner, key, config)
            except (OSError, ValueError) as error:
                found = Forecast((), None, f"No forecast could be made: {error}", True)
            with self._lock:
                if self._wanted.get(owner, ("",))[0] == key:
                    del self._wanted[owner]
                if found is not None:
                    self._keep(key, found)

    def _keep(self, key: str, forecast: Forecast) -> None:
        self._known[key] = forecast
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]

    def _make(self, owner: str, key: str, config: DreamboothConfig) -> Forecast | None:
        """The forecast, or None when something else is wanted by now."""
        step_s, origin = self._earlier(config)
        built_in = bool(built_in_version(config.model.base))
        trial = step_s is None and built_in and config.train.prior != "class_images"
        if trial and is_working(self.sessions):
            trial, origin = False, WAITS
        folder = self.folder.part("cache") / f"forecast-{new_id()}"
        try:
            folder.mkdir()
            save_config(_shortened(config, folder) if trial else config, folder)
            output, steps = self._run(owner, key, folder, trial)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if output is None:
            return None
        if steps is not None:
            step_s, origin = steps, f"Measured just now in {TRIED_STEPS} steps."
        memory = _memory_lines(output)
        if not memory:
            return Forecast((), None, runner.explain_failure(1, None, output), True)
        return Forecast(memory, step_s, origin, True)

    def _run(
        self, owner: str, key: str, folder: Path, trial: bool
    ) -> tuple[str | None, float | None]:
        """Output of the command, None where it became unwanted; and seconds a step, if tried."""
        log, end = folder / "log.txt", time.monotonic() + LIMIT_S
        argv = ("--resume", str(folder)) if trial else ("--resume", str(folder), "--dry-run")
        process = runner.start(self.folder, folder / "latents", argv, log)
        try:
            while process.poll() is None and time.monotonic() < end:
                with self._lock:
                    if self._wanted.get(owner, ("",))[0] != key:
                        return None, None
                if trial and _steps_seen(folder) >= TRIED_STEPS:
                    break
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        steps = seconds_a_step(read_events(folder / "events.jsonl")) if trial else None
        return runner.read_log(log), steps

    def _earlier(self, config: DreamboothConfig) -> tuple[float | None, str]:
        """Seconds a step in the newest run of the same kind."""
        with self.sessions() as session:
            begun = select(Job.id).where(Job.started_at.is_not(None))
            ids = session.scalars(begun.order_by(Job.started_at.desc()).limit(EARLIER)).all()
        for id in ids:
            run = self.folder.of("runs", id)
            try:
                same = _speed(load_run(run)) == _speed(config)
                step_s = seconds_a_step(read_events(run / "events.jsonl")) if same else None
            except (ConfigError, ValueError, OSError):  # of another version, or damaged
                continue
            if step_s is not None:
                return step_s, "As in your earlier run of this kind."
        return None, "The time is known after the first steps of the run."


def _speed(config: DreamboothConfig) -> list[Any]:
    return [get_key(config, key) for key in SPEED_KEYS]


def _key(config: DreamboothConfig) -> str:
    """The same for configs whose forecast is the same: steps are only a factor."""
    train = config.train.model_copy(update={"steps": 1})
    output = config.output.model_copy(update={"dir": "run"})
    plain = config.model_copy(update={"train": train, "output": output})
    return hashlib.sha256(plain.model_dump_json().encode()).hexdigest()


def _shortened(config: DreamboothConfig, folder: Path) -> DreamboothConfig:
    """The same settings for a few steps."""
    few = {"steps": TRIED_STEPS, "log_every": 1, "checkpoint_every": 0}
    return config.model_copy(update={"train": config.train.model_copy(update=few)})


def _steps_seen(folder: Path) -> int:
    return sum(event["event"] == "step" for event in read_events(folder / "events.jsonl"))


def _memory_lines(output: str) -> tuple[str, ...]:
    """From "predicted memory" on, what is indented below it."""
    lines = [line.removeprefix("# ") for line in output.splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("predicted memory")), None)
    if start is None:
        return ()
    more = re.compile(r" +\S")
    end = start + 1
    while end < len(lines) and more.match(lines[end]):
        end += 1
    return tuple(line.strip() for line in lines[start:end])
