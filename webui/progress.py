"""The progress of a run, from what it has written to ``events.jsonl`` since the last look."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nora_diffusion.events import Event, read_new_events
from webui.paths import DataFolder

KEPT = 500
"""Runs whose progress is kept in memory."""

POINTS = 400
"""Losses that are kept for a plot; of a longer run every second, fourth, ... one."""


@dataclass
class Progress:
    """What the events of one run add up to; ``update`` takes in new ones.

    Attributes:
        step: optimiser steps completed.
        loss: mean loss since the event before.
        losses: step and loss, for a plot.
        eta_s: seconds to the end, as estimated at ``eta_time``.
        checkpoint: step of the newest checkpoint, or None.
        image: newest picture, inside the run folder.
        last: the last event, or None.
        error: message of the last ``error`` event, and its time.
    """

    run: Path
    step: int = 0
    loss: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    eta_s: float | None = None
    eta_time: float = 0.0
    checkpoint: int | None = None
    image: Path | None = None
    last: Event | None = None
    error: tuple[float, str] | None = None
    _offset: int = 0

    def update(self) -> Progress:
        """Read what is new."""
        events, self._offset = read_new_events(self.run / "events.jsonl", self._offset)
        self._take_in(events)
        return self

    def _take_in(self, events: Iterable[Event]) -> None:
        for event in events:
            self.last = event
            step = event["step"]
            if event["event"] == "start":  # perhaps again, from a checkpoint some steps back
                self.losses = [point for point in self.losses if point[0] <= (step or 0)]
                self.eta_s = None
            if step is not None:
                self.step = step
            if event["event"] == "step" and step is not None:
                self.loss = event["loss"]
                self.eta_s, self.eta_time = event["eta_s"], event["time"]
                if self.loss is not None:
                    self.losses.append((step, self.loss))
            if event["event"] == "checkpoint":
                self.checkpoint = step
            if event["image"]:
                self.image = self._inside(event["image"]) or self.image
            if event["event"] == "error":
                self.error = event["time"], event["message"] or ""
        if len(self.losses) > POINTS:
            self.losses = self.losses[::2]

    def _inside(self, name: str) -> Path | None:
        path = (self.run / name).resolve()
        return path if path.is_relative_to(self.run.resolve()) else None


class ProgressBook:
    """The progress of the runs that were asked for last; for use by several threads."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[str, Progress] = {}

    def of(self, job: str, *, live: bool = True) -> Progress:
        """The progress of a run, by the id of its job.

        Args:
            job: the id.
            live: whether to look for new events, though the run was read before.
        """
        with self._lock:
            known = self._kept.pop(job, None)
            progress = known or Progress(self._folder.of("runs", job))
            self._kept[job] = progress  # the newest last
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return progress.update() if live or known is None else progress


def seconds_a_step(events: Iterable[Event]) -> float | None:
    """Median over the pairs of neighbouring ``step`` events; None with fewer than two.

    Being a median, it leaves out the pauses for checkpoints and sheets.
    """
    times: list[float] = []
    before: Event | None = None
    for event in events:
        if event["event"] == "start":
            before = None
        if event["event"] != "step":
            continue
        if before is not None and (event["step"] or 0) > (before["step"] or 0):
            steps = (event["step"] or 0) - (before["step"] or 0)
            times.append((event["time"] - before["time"]) / steps)
        before = event
    return sorted(times)[len(times) // 2] if times else None
