"""The adapters: what runs have left, and files that were imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from webui.database import Sessions
from webui.paths import DataFolder

Layout = Literal["native", "diffusers", "kohya"]


@dataclass(frozen=True)
class AdapterView:
    """An adapter as the tabs and the API show it.

    Attributes:
        path: the adapter file itself.
        kind: "nora" for the native file, "lora" for any other.
        thumbnail: a picture of what it draws, or None.
    """

    id: str
    name: str
    kind: Literal["nora", "lora"]
    path: Path
    base: str
    family: str | None
    trigger: str | None
    class_name: str | None
    r: int | None
    inner_r: int | None
    steps: int | None
    loss: float | None
    size_bytes: int
    created_at: float
    thumbnail: Path | None
    job_id: str | None


class Library:
    """All adapters; every method takes whose they are."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions

    def adopt(self, job_id: str) -> AdapterView | None:
        """Take the adapter of a finished run over (again: the same one); None: it left none."""
        raise NotImplementedError

    def all(self, owner: str) -> list[AdapterView]:
        """Newest first; without those in the bin."""
        raise NotImplementedError

    def get(self, owner: str, id_or_name: str) -> AdapterView:
        """One adapter by id, or by name where only one has it.

        Raises:
            UserError: when this owner has none such, or several.
        """
        raise NotImplementedError
