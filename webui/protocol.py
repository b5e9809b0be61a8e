"""What the sampler and its worker process say to each other: one JSON text a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

PICTURES_AT_MOST = 64
"""Of one request, over all its seeds and strengths."""


@dataclass(frozen=True)
class Weighted:
    """An adapter file of the data folder, how strong it is, and the id it is shown under."""

    path: Path
    weight: float
    id: str
    name: str


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        base: base model, or the name of a shipped config; with adapters, the one they were trained
            on.
        prompt: ``{trigger}`` and ``{class_name}`` are filled in from the first adapter.
        adapters: up to four, blended by adding their effects.
        n: pictures of each strength; picture i has ``seed + i``.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1: off.
        width_px: None: the base's own.
        height_px: None: the base's own.
        strengths: factors on all weights; each draws the same seeds. Where there are several, a
            labelled grid of all pictures is made as well.
    """

    base: str
    prompt: str
    adapters: tuple[Weighted, ...] = ()
    negative_prompt: str = ""
    n: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 3.0
    width_px: int | None = None
    height_px: int | None = None
    strengths: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """Pictures, without the grid."""
        return self.n * len(self.strengths)

    @property
    def has_sheet(self) -> bool:
        """Whether a grid is made."""
        return len(self.strengths) > 1


@dataclass(frozen=True)
class Order:
    """A request, and the files in ``pictures`` for its pictures (strength by strength) and grid."""

    request: Request
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Reply:
    """One line of the worker's.

    Attributes:
        kind: "ready" once, when it has started; then for each order any number of "progress" and
            one of "drawn", "refused" (what to change is in ``text``), "stopped" or "failed".
        text: for the reader.
        done: share of the request, from 0 to 1.
        settings: of each file, as they stand inside it.
        notes: of the request: see ``sampler.Drawn``; of "ready" the device.
    """

    kind: Literal["ready", "progress", "drawn", "refused", "stopped", "failed"]
    text: str = ""
    done: float = 0.0
    settings: tuple[dict[str, Any], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


ORDER, REPLY = TypeAdapter(Order), TypeAdapter(Reply)
STOP = json.dumps("stop")
"""The line that ends the request at hand."""

SETTINGS_KEY = "nora.settings"
"""Text chunk of a picture that holds its settings as JSON."""
