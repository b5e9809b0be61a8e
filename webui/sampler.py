"""Pictures from one warm worker process, which keeps the last base and its adapters loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webui.paths import DataFolder


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
        base: base model; with adapters, the one they were trained on.
        prompt: ``{trigger}`` and ``{class_name}`` are filled in from the first adapter.
        adapters: up to four, blended by adding their effects.
        n: pictures; picture i has ``seed + i``.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1: off.
        width_px: None: the base's own.
        height_px: None: the base's own.
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


@dataclass(frozen=True)
class Drawn:
    """Files in ``pictures``, and the settings of each as they stand inside it."""

    files: list[Path]
    settings: list[dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)


class Sampler:
    """Client of the worker process; requests are answered one at a time, first come first."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder

    def draw(self, request: Request, progress: Callable[[float, str], None] | None = None) -> Drawn:
        """Wait for one's turn and draw.

        Raises:
            UserError: what the worker says cannot be done; when it died, that it was started again.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Give the worker's memory back, after the request at hand; the next one starts it anew."""
        raise NotImplementedError

    def close(self) -> None:
        """End the worker."""
