"""The gallery: every picture that was drawn, with its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webui.database import Sessions
from webui.paths import DataFolder


@dataclass(frozen=True)
class PictureView:
    """A picture and the settings it was drawn with."""

    id: str
    path: Path
    settings: dict[str, Any]
    created_at: float


class Pictures:
    """All pictures; every method takes whose they are."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions

    def add(self, owner: str, path: Path, settings: dict[str, Any]) -> PictureView:
        """Take a file of ``pictures`` into the gallery; its stem is the picture's id."""
        raise NotImplementedError

    def all(self, owner: str, limit: int = 60) -> list[PictureView]:
        """Newest first."""
        raise NotImplementedError
