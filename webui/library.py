"""The adapters: what runs have left, and files that were imported."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from nora_diffusion.config import UserError
from nora_diffusion.events import read_events
from nora_diffusion.families import FAMILIES
from webui.adapter_file import AdapterFile, read_adapter
from webui.bases import usable_base
from webui.bin import expired_before, forget_deleted_rows, owned
from webui.database import Sessions
from webui.export import Exports, Layout
from webui.library_files import IMPORTED, NATIVE, LibraryFiles
from webui.models import Adapter, Job
from webui.paths import NAME_LIMIT, DataFolder, clean_name, new_id


@dataclass(frozen=True)
class AdapterView:
    """An adapter as the tabs and the API show it.

    Attributes:
        path: the adapter file itself.
        kind: "nora" for the native file, "lora" for any other.
        thumbnail: a picture of what it draws, or None.
        card: file of its model card, as it came; or None.
        deleted_at: of one in the bin.
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
    card: Path | None = None
    deleted_at: float | None = None


class Library:
    """All adapters; every method takes whose they are."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions
        self.files = LibraryFiles(folder)
        self.exports = Exports(self.files)
        self._writing = threading.RLock()  # a name is looked up and taken in one go

    def adopt(self, job_id: str) -> AdapterView | None:
        """Take the adapter of a finished run over (again: the same one); None: it left none."""
        run = self.folder.of("runs", job_id)
        if not (run / NATIVE).is_file():
            return None
        found = read_adapter(run / NATIVE)
        with self._writing, self.sessions.begin() as session:
            job = session.get_one(Job, job_id)
            row = session.scalar(select(Adapter).where(Adapter.job_id == job_id))
            if row is None:
                name = _unused_name(session, job.owner, job.name)
                row = Adapter(id=new_id(), owner=job.owner, name=name, job_id=job_id)
                session.add(row)
            self.files.take_run(row.id, run)
            self._fill(row, "nora", NATIVE, found, job.base)
            row.steps, row.loss = _course(run / "events.jsonl")
            session.flush()
            return self._view(row)

    def import_file(
        self, owner: str, path: Path, name: str, base: str = "", shown_name: str = ""
    ) -> AdapterView:
        """Take an uploaded adapter file over.

        Args:
            owner: whose it will be.
            path: inside ``uploads``.
            name: shown in lists; "": the one the file came with.
            base: base model it was trained on; "": the one the file names.
            shown_name: the name the file came with.

        Raises:
            UserError: when it is not an adapter in a whole safetensors file, or its base model is
                not known.
        """
        source = self.folder.uploaded(path)
        found = read_adapter(source)
        base = _base_of(found, base.strip(), owner)
        wanted = clean_name(name or Path(shown_name or "adapter").stem[:NAME_LIMIT], "name")
        id = new_id()
        try:
            self.files.take_import(id, source)
            with self._writing, self.sessions.begin() as session:
                row = Adapter(id=id, owner=owner, name=_unused_name(session, owner, wanted))
                session.add(row)
                self._fill(row, found.kind, IMPORTED, found, base)
                row.steps = _whole(found.about.get("steps"))
                session.flush()
                return self._view(row)
        except BaseException:
            shutil.rmtree(self.files.home(id), ignore_errors=True)
            raise

    # --- looking at them

    def all(self, owner: str) -> list[AdapterView]:
        """Newest first; without those in the bin."""
        return self._list(owner, Adapter.deleted_at.is_(None))

    def get(self, owner: str, id_or_name: str) -> AdapterView:
        """One adapter by id, or by name where only one has it.

        Raises:
            UserError: when this owner has none such, or several.
        """
        found = self.all(owner)
        for key in ("id", "name"):
            fitting = [one for one in found if getattr(one, key) == id_or_name]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise UserError(
                    f"{len(fitting)} adapters are called {id_or_name[:NAME_LIMIT]}; give the id: "
                    f"{', '.join(one.id for one in fitting)}"
                )
        named = ", ".join(one.name for one in found[:20]) or "none yet"
        raise UserError(
            f"there is no adapter called {id_or_name[:NAME_LIMIT] or '(nothing)'}; there are: "
            f"{named}"
        )

    def download(self, owner: str, id: str, layout: Layout) -> Path:
        """The file in a layout, under a name that says what it is.

        Raises:
            UserError: when there is no such adapter, or its family has no such layout.
        """
        with self.sessions() as session:
            adapter = owned(session, Adapter, owner, id)
        return self.exports.file(adapter, layout)

    # --- changing them

    def rename(self, owner: str, id: str, name: str) -> AdapterView:
        """Give an adapter another name.

        Raises:
            UserError: when it is no name, or another adapter of this owner has it.
        """
        wanted = clean_name(name, "name")
        with self._writing, self.sessions.begin() as session:
            row = owned(session, Adapter, owner, id)
            if wanted != row.name and _unused_name(session, owner, wanted) != wanted:
                raise UserError(f"another adapter is called {wanted}; give another name")
            row.name = wanted
            return self._view(row)

    def delete(self, owner: str, id: str) -> None:
        """Put an adapter into the bin."""
        with self.sessions.begin() as session:
            owned(session, Adapter, owner, id).deleted_at = time.time()

    def restore(self, owner: str, id: str) -> None:
        """Take an adapter out of the bin; where its name was given away, it gets another one.

        Raises:
            UserError: when it is not there.
        """
        with self._writing, self.sessions.begin() as session:
            row = owned(session, Adapter, owner, id, in_bin=True)
            row.name = _unused_name(session, owner, row.name)
            row.deleted_at = None

    def binned(self, owner: str) -> list[AdapterView]:
        """What is in the bin."""
        return self._list(owner, Adapter.deleted_at.is_not(None))

    def purge(self, owner: str, id: str) -> None:
        """Delete an adapter of the bin for good, with its exports; its run stays."""
        with self.sessions() as session:
            owned(session, Adapter, owner, id, in_bin=True)
        self._erase(id)

    def expire(self, now: float | None = None) -> None:
        """Delete for good what has been in the bin for 30 days, of all owners.

        Args:
            now: seconds since 1970; None: now.
        """
        over = select(Adapter.id).where(Adapter.deleted_at < expired_before(now))
        with self.sessions() as session:
            found = list(session.scalars(over))
        for id in found:
            self._erase(id)

    def tidy(self) -> None:
        """Remove what a crash left half done: folders that no adapter stands for."""
        with self._writing, self.sessions() as session:
            self.files.tidy(set(session.scalars(select(Adapter.id))))

    # --- inside

    def _erase(self, id: str) -> None:
        with self._writing:
            with self.sessions.begin() as session:
                session.delete(session.get_one(Adapter, id))
            forget_deleted_rows(self.sessions)
            self.files.erase(id)

    def _fill(self, row: Adapter, kind: str, file_name: str, found: AdapterFile, base: str) -> None:
        """Write down what a file says of itself."""
        family = found.word("family")
        row.kind, row.file_name, row.base = kind, file_name, base
        row.family = family if family in FAMILIES else None
        row.trigger = _plain(found.word("trigger"))
        row.class_name = _plain(found.word("class_name"))
        row.r, row.inner_r, row.checksum = found.r, found.inner_r, found.checksum
        row.size_bytes = self.files.adapter(row).stat().st_size

    def _list(self, owner: str, condition: ColumnElement[bool]) -> list[AdapterView]:
        wanted = select(Adapter).where(Adapter.owner == owner, condition)
        with self.sessions() as session:
            rows = session.scalars(wanted.order_by(Adapter.created_at.desc()))
            return [self._view(row) for row in rows]

    def _view(self, row: Adapter) -> AdapterView:
        return AdapterView(
            id=row.id,
            name=row.name,
            kind="nora" if row.kind == "nora" else "lora",
            path=self.files.adapter(row),
            base=row.base,
            family=row.family,
            trigger=row.trigger,
            class_name=row.class_name,
            r=row.r,
            inner_r=row.inner_r,
            steps=row.steps,
            loss=row.loss,
            size_bytes=row.size_bytes,
            created_at=row.created_at,
            thumbnail=self.files.thumbnail(row.id),
            job_id=row.job_id,
            card=self.files.card(row.id),
            deleted_at=row.deleted_at,
        )


def _base_of(found: AdapterFile, given: str, owner: str) -> str:
    """Base model of a file: as given, else as the file says if that cannot lead anywhere."""
    base = given or found.word("base") or ""
    usable = usable_base(base, paths=given != "" and owner == "")
    if usable is not None:
        return usable
    asked = f"“{base[:NAME_LIMIT]}” is not a base model that is known here" if base else (
        "the file does not say which base model it was trained on"
    )  # fmt: skip
    raise UserError(f"{asked}; choose the base model, or give its Hugging Face id (owner/name)")


def _unused_name(session: Session, owner: str, name: str) -> str:
    """The name, or the next of "name 2", "name 3", ... that no adapter of the owner has."""
    wanted = select(Adapter.name).where(Adapter.owner == owner, Adapter.deleted_at.is_(None))
    taken = set(session.scalars(wanted))
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name[: NAME_LIMIT - 8]} {number}"
    return found


def _plain(word: str | None) -> str | None:
    try:
        return None if word is None else clean_name(word[:NAME_LIMIT], "word")
    except UserError:
        return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _course(events: Path) -> tuple[int | None, float | None]:
    """Steps of a run, and the loss it last wrote."""
    try:
        found = read_events(events)
    except ValueError:
        return None, None
    steps = [event["step"] for event in found if event["step"] is not None]
    losses = [event["loss"] for event in found if event["loss"] is not None]
    return max(steps, default=None), losses[-1] if losses else None
