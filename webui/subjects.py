"""Subjects: photos that a person uploads, with what they are called."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, select

from nora_diffusion.config import UserError
from webui.bin import expired_before, forget_deleted_rows, owned
from webui.database import Sessions
from webui.dispatcher import is_working
from webui.models import Job, Subject
from webui.paths import NAME_LIMIT, DataFolder, clean_name, new_id
from webui.photos import Check
from webui.rights import Rights
from webui.subject_files import SubjectFiles
from webui.subject_photos import PhotoView, SubjectPhotos


@dataclass(frozen=True)
class SubjectView:
    """A subject as the tabs and the API show it; ``deleted_at`` of one in the bin."""

    id: str
    name: str
    class_name: str
    trigger: str
    created_at: float
    photos: tuple[PhotoView, ...]
    draft: bool = False
    deleted_at: float | None = None


class Subjects:
    """All subjects; every method takes whose they are, and knows no others."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions
        self.files = SubjectFiles(folder)
        self.rights = Rights(sessions)
        self.photos = SubjectPhotos(self.files, sessions, self.rights)

    # --- making and changing

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
            UserError: when no photo is usable, there are too many, a word is missing, or this
                owner has not confirmed their rights.
        """
        words = _clean_words(name, class_name, trigger)
        id = self._begin(owner, draft=False, **words)
        try:
            unusable = self.photos.add(owner, id, files)
            subject = self.get(owner, id)
            if not subject.photos:
                told = "; ".join(f"{check.photo} {check.reason}" for check in unusable)
                raise UserError(f"no photo can be used: {told or 'none was given'}")
        except BaseException:
            self._erase(id)
            raise
        return subject, unusable + self.photos.checks(owner, id)

    def draft(self, owner: str) -> SubjectView:
        """The subject that this owner has begun with and not saved; an empty one if there is none.

        Photos and captions are added to it as to any other; ``save`` makes it one of ``all``.
        """
        with self.photos.writing:
            with self.sessions() as session:
                row = session.scalar(
                    select(Subject).where(Subject.owner == owner, Subject.draft.is_(True))
                )
                if row is not None:
                    return self._view(row)
            id = self._begin(owner, draft=True, name="", class_name="", trigger="sks")
            return self.get(owner, id)

    def note(self, owner: str, id: str, name: str, class_name: str, trigger: str) -> None:
        """Keep what has been typed for a draft, whatever it is; other subjects stay as they are."""
        with self.sessions.begin() as session:
            row = owned(session, Subject, owner, id)
            if row.draft:
                limit = 2 * NAME_LIMIT  # too long a name is told when it is saved
                row.name, row.class_name, row.trigger = (
                    text[:limit] for text in (name, class_name, trigger)
                )

    def save(self, owner: str, id: str, name: str, class_name: str, trigger: str) -> SubjectView:
        """Give a subject its words; a draft becomes one of ``all``.

        Raises:
            UserError: when a word is missing, there is no photo, or this owner has not confirmed
                their rights.
        """
        words = _clean_words(name, class_name, trigger)
        self.rights.require(owner)
        with self.sessions.begin() as session:
            row = owned(session, Subject, owner, id)
            if not row.photos:
                raise UserError("photos: none yet; give 3 to 20 photos of the subject")
            row.name, row.class_name, row.trigger = words.values()
            if row.draft:
                row.draft, row.created_at = False, time.time()
            return self._view(row)

    # --- looking at them

    def all(self, owner: str) -> list[SubjectView]:
        """Newest first; without drafts and those in the bin."""
        return self._list(owner, Subject.deleted_at.is_(None), Subject.draft.is_(False))

    def get(self, owner: str, id: str) -> SubjectView:
        """One subject, or the draft.

        Raises:
            UserError: when this owner has none of that id, or it is in the bin.
        """
        with self.sessions() as session:
            return self._view(owned(session, Subject, owner, id))

    # --- the bin

    def delete(self, owner: str, id: str) -> None:
        """Put a subject into the bin; of a draft nothing is kept."""
        if self.get(owner, id).draft:
            self.purge(owner, id)
            return
        with self.sessions.begin() as session:
            owned(session, Subject, owner, id).deleted_at = time.time()

    def restore(self, owner: str, id: str) -> None:
        """Take a subject out of the bin.

        Raises:
            UserError: when it is not there.
        """
        with self.sessions.begin() as session:
            owned(session, Subject, owner, id, in_bin=True).deleted_at = None

    def binned(self, owner: str) -> list[SubjectView]:
        """What is in the bin."""
        return self._list(owner, Subject.deleted_at.is_not(None))

    def purge(self, owner: str, id: str) -> None:
        """Delete a subject of the bin for good, or the draft: every trace of its photos.

        That is photos, captions, thumbnails, latents, copies in ``uploads``, and the picture of
        each run that shows the photos. Adapters and what they drew stay.

        Raises:
            UserError: when training uses the photos.
        """
        with self.sessions() as session:
            row = session.get(Subject, id)
            owned(session, Subject, owner, id, in_bin=row is None or not row.draft)
        self.photos.refuse_while_training(id)
        self._erase(id)

    def expire(self, now: float | None = None) -> None:
        """Delete for good what has been in the bin for 30 days, of all owners.

        Args:
            now: seconds since 1970; None: now.
        """
        with self.sessions() as session:
            over = session.scalars(select(Subject).where(Subject.deleted_at < expired_before(now)))
            found = [row.id for row in over]
        for id in found:
            if not is_working(self.sessions, id):
                self._erase(id)
        forget_deleted_rows(self.sessions)  # also of what was changed since

    def tidy(self) -> None:
        """Remove what a crash left half done: files that no photo stands for."""
        with self.photos.writing, self.sessions() as session:
            rows = session.scalars(select(Subject))
            known = {row.id: {Path(p.file_name).stem for p in row.photos} for row in rows}
            self.files.tidy(known)

    # --- inside

    def _begin(self, owner: str, draft: bool, name: str, class_name: str, trigger: str) -> str:
        id = new_id()
        self.files.photos(id).mkdir(parents=True)
        with self.sessions.begin() as session:
            session.add(
                Subject(
                    id=id, owner=owner, draft=draft, name=name, class_name=class_name,
                    trigger=trigger,
                )
            )  # fmt: skip
        return id

    def _erase(self, id: str) -> None:
        with self.photos.writing:
            with self.sessions.begin() as session:
                row = session.get(Subject, id)
                runs = list(session.scalars(select(Job.id).where(Job.subject_id == id)))
                if row is not None:
                    session.delete(row)
            forget_deleted_rows(self.sessions)
            self.files.erase(id, runs)  # after the row: what a crash leaves, ``tidy`` removes

    def _list(self, owner: str, *conditions: ColumnElement[bool]) -> list[SubjectView]:
        wanted = select(Subject).where(Subject.owner == owner, *conditions)
        with self.sessions() as session:
            rows = session.scalars(wanted.order_by(Subject.created_at.desc()))
            return [self._view(row) for row in rows]

    def _view(self, row: Subject) -> SubjectView:
        return SubjectView(
            row.id, row.name, row.class_name, row.trigger, row.created_at,
            tuple(self.photos.view(photo) for photo in row.photos), row.draft, row.deleted_at,
        )  # fmt: skip


def _clean_words(name: str, class_name: str, trigger: str) -> dict[str, str]:
    given = {"name": name, "class word": class_name, "trigger word": trigger}
    cleaned = [clean_name(text, what) for what, text in given.items()]
    return dict(zip(("name", "class_name", "trigger"), cleaned, strict=True))
