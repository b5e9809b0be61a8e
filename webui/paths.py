"""The one folder that holds all of the app's files; nothing outside it is read or written."""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from nora_diffusion.config import UserError

_ID = re.compile(r"[0-9a-f]{16}")


def default_data_dir() -> Path:
    """Where the platform keeps the data of a user's programs."""
    return Path(platformdirs.user_data_dir("nora-diffusion", appauthor=False))


def new_id() -> str:
    """A name for a folder or file of ours: 16 hex digits, never a word of the user's."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class DataFolder:
    """Places inside the data folder.

    Users' names are kept in the database alone. On disk everything is named by an id of ours, so
    no name that a person or a program gives can lead anywhere.

        nora.sqlite3   subjects/ID/photos/   runs/ID/   adapters/ID/   pictures/ID.png
        exports/ID/    cache/                latents/SUBJECT/   logs/JOB.log
        uploads/       what browsers send, until it is taken over or too old
    """

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> DataFolder:
        """Make the folder and its parts where they are missing.

        Raises:
            UserError: when the place cannot be used.
        """
        folder = cls(Path(root).expanduser().resolve())
        try:
            folder.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in PARTS:
                folder.part(name).mkdir(exist_ok=True)
            probe = folder.root / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--data-dir {folder.root}: cannot be used ({error.strerror}); give a folder that "
                "you may write to"
            ) from None
        return folder

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "nora.sqlite3"

    def part(self, name: str) -> Path:
        """One of ``PARTS``."""
        if name not in PARTS:
            raise ValueError(f"{name}: not a part of the data folder")
        return self.root / name

    def of(self, part: str, id: str, suffix: str = "") -> Path:
        """The folder or file of a thing by its id.

        Raises:
            ValueError: when the id is not one that ``new_id`` makes.
        """
        if not _ID.fullmatch(id):
            raise ValueError(f"{id!r}: not an id")
        return self.part(part) / f"{id}{suffix}"

    def uploaded(self, path: str | Path) -> Path:
        """A path that a browser or program named, if it is a file that was uploaded.

        Raises:
            UserError: when it is anything else: no file is read because a request names it.
        """
        refused = UserError("the file was not uploaded to this app; upload it first")
        try:
            resolved = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise refused from None
        uploads = self.part("uploads").resolve()
        if not resolved.is_relative_to(uploads) or not resolved.is_file():
            raise refused
        return resolved


PARTS = (
    "subjects", "runs", "adapters", "pictures", "exports", "cache", "latents", "logs",
    "uploads",
)  # fmt: skip

NAME_LIMIT = 80
"""Letters in a name that a person gives."""


def clean_name(text: str, what: str) -> str:
    """A name as it is kept: NFC, one line, no control or direction characters, spaces single.

    Args:
        text: as given.
        what: the user's word for it, such as "name" or "trigger word", for messages.

    Raises:
        UserError: when nothing is left, or it is longer than ``NAME_LIMIT``.
    """
    normal = unicodedata.normalize("NFC", text)
    kept = "".join(" " if c.isspace() else c for c in normal if _is_plain(c))
    kept = " ".join(kept.split())
    if not kept:
        raise UserError(f"{what}: missing; give one with at least one letter")
    if len(kept) > NAME_LIMIT:
        raise UserError(f"{what}: {len(kept)} letters; give at most {NAME_LIMIT}")
    return kept


def file_stem(name: str) -> str:
    """ASCII letters, digits and hyphens of a name, for a file that a person downloads."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60]
    # Windows keeps these names for devices, whatever their ending.
    reserved = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(10))}
    return f"{stem}-file" if stem in reserved else stem or "adapter"


def _is_plain(character: str) -> bool:
    # Zs is every space; other control, format (bidirectional overrides, joiners), surrogate and
    # unassigned characters can make a name look like another one.
    category = unicodedata.category(character)
    return character.isspace() or category[0] != "C"
