"""Subjects: photos that a person uploads, with what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from webui.database import Sessions
from webui.paths import DataFolder


@dataclass(frozen=True)
class Check:
    """What is wrong with one photo.

    Attributes:
        photo: the name it was uploaded under.
        level: "warning": it is used as it is; "unusable": it is left out.
        reason: a sentence with what to do.
    """

    photo: str
    level: Literal["warning", "unusable"]
    reason: str


@dataclass(frozen=True)
class PhotoView:
    """A photo of a subject: its id, the name it came with, its file, size in px and caption."""

    id: str
    shown_name: str
    path: Path
    size: tuple[int, int]
    caption: str


@dataclass(frozen=True)
class SubjectView:
    """A subject as the tabs and the API show it."""

    id: str
    name: str
    class_name: str
    trigger: str
    created_at: float
    photos: tuple[PhotoView, ...]


class Subjects:
    """All subjects; every method takes whose they are, and knows no others."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions

    def create(
        self,
        owner: str,
        name: str,
        class_name: str,
        trigger: str,
        files: Sequence[tuple[Path, str]],
    ) -> tuple[SubjectView, list[Check]]:
        """Keep uploaded photos as a new subject.

        Args:
            owner: whose it is.
            name: shown in lists; need not be unique.
            class_name: common noun, such as "dog".
            trigger: word that will stand for the subject.
            files: paths inside ``uploads`` and the names they came with.

        Returns:
            The subject, and what is wrong with its photos.

        Raises:
            UserError: when no photo is usable, there are too many, or a word is missing.
        """
        raise NotImplementedError

    def all(self, owner: str) -> list[SubjectView]:
        """Newest first; without those in the bin."""
        raise NotImplementedError

    def get(self, owner: str, id: str) -> SubjectView:
        """One subject.

        Raises:
            UserError: when this owner has none of that id.
        """
        raise NotImplementedError

    def photos_folder(self, owner: str, id: str) -> Path:
        """Folder with photos and captions, as ``data.subject`` takes it."""
        raise NotImplementedError
