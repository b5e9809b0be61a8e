"""What a run tells: progress bar, ``events.jsonl``, and trackers such as TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image
from tqdm import tqdm

from nora_diffusion.events import EventLog, EventName
from nora_diffusion.train.trackers import log_picture

EVENTS = "events.jsonl"


class Report:
    """The channels of one run; close it, or use it as a context manager.

    The progress bar appears with the first step.
    """

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int,
        log_every: int,
        trackers: Sequence[Any] = (),
        silent: bool = False,
    ) -> None:
        """Open the run's event log.

        Args:
            run: the run folder.
            total_steps: of the run.
            log_every: steps between two events that tell the loss.
            trackers: each an ``accelerate.tracking.GeneralTracker``.
            silent: tell nothing, as in all processes of a run but the first.
        """
        self.run = run
        self.total_steps = total_steps
        self.log_every = log_every
        self._events = None if silent else EventLog(run / EVENTS)
        self._trackers = trackers
        self._bar: tqdm[Any] | None = None
        self._losses: list[float] = []
        self._training_s = 0.0
        self._steps = 0
        self._lap = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close bar and trackers; events can still be written."""
        self.end_loop()
        for tracker in self._trackers:
            tracker.finish()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._events is not None:
            tqdm.write(message)

    def event(self, event: EventName, step: int | None = None, **fields: Any) -> None:
        """Write one event; see ``events.EventLog.write``."""
        if self._events is not None:
            self._events.write(event, step, **fields)

    def counted(self, batches: Sequence[int], what: str) -> Iterator[int]:
        """The batches, with a bar that goes when they are through."""
        yield from tqdm(
            batches, desc=what, unit="batch", leave=False, dynamic_ncols=True,
            disable=self._events is None,
        )  # fmt: skip

    def start_loop(self, step: int) -> None:
        """Show the bar, and measure time from here on."""
        self._bar = tqdm(
            total=self.total_steps, initial=step, desc="training", unit="step",
            dynamic_ncols=True, disable=self._events is None,
        )  # fmt: skip
        self._lap = time.monotonic()

    def end_loop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, step: int, loss: float, lr: float) -> None:
        """Take in a finished step; ``step`` counts those completed."""
        now = time.monotonic()
        self._training_s += now - self._lap
        self._lap = now
        self._steps += 1
        self._losses.append(loss)
        if self._bar is not None:
            mean = sum(self._losses) / len(self._losses)
            self._bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.1e}", refresh=False)
            self._bar.update()
        if step % self.log_every == 0 or step == self.total_steps:
            self._flush(step, lr)

    def pause(self) -> None:
        """Leave the time since the last step out of rate and ETA (checkpoints, sheets)."""
        self._lap = time.monotonic()

    def picture(self, step: int, path: Path, image: Image.Image, message: str) -> None:
        """Announce a picture that was written into the run folder."""
        shown = path.relative_to(self.run).as_posix()
        self.event("sample", step, image=shown, message=message)
        for tracker in self._trackers:
            log_picture(tracker, message, image, step)

    def _flush(self, step: int, lr: float) -> None:
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        eta_s = (self.total_steps - step) * self._training_s / self._steps
        self.event("step", step, loss=loss, lr=lr, eta_s=round(eta_s, 1))
        values = {"loss": loss, "lr": lr, "steps_per_s": self._steps / self._training_s}
        for tracker in self._trackers:
            tracker.log(values, step)
