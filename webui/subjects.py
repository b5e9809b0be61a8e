"""Subjects: photos that a person uploads, with what they are called."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from nora_diffusion.config import UserError
from nora_diffusion.data import images
from webui.bin import expired_before, forget_deleted_rows, owned
from webui.database import Sessions
from webui.models import Choice, Job, Photo, Subject
from webui.paths import NAME_LIMIT, DataFolder, clean_name, new_id
from webui.photos import RESOLUTIONS_PX, Check, Examined, check_photos, look_at
from webui.subject_files import SubjectFiles

__all__ = ["Check", "PhotoView", "SubjectView", "Subjects"]

SUBJECT_LIMIT_BYTES = 200 * 2**20
CAPTION_LIMIT = 1000
"""Letters; the text encoders of the bases read 77 to 512 tokens."""

_RIGHTS = "may use the uploaded photos"
_NO_RIGHTS = (
    "nothing was kept: confirm once that you have the right to use these photos, then go on"
)


@dataclass(frozen=True)
class PhotoView:
    """A photo of a subject.

    Attributes:
        shown_name: the name it came with; no two of a subject have the same.
        size: width and height in px, upright.
        thumbnail: a small picture of it, without what the camera wrote about time and place.
    """

    id: str
    shown_name: str
    path: Path
    size: tuple[int, int]
    caption: str
    thumbnail: Path


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
        self._writing = threading.RLock()  # photos are numbered and counted one upload at a time

    # --- the right to use the photos

    def has_rights(self, owner: str) -> bool:
        """Whether this owner has said that they may use the photos they upload."""
        with self.sessions() as session:
            return session.scalar(_rights_of(owner)) is not None

    def confirm_rights(self, owner: str) -> None:
        """Keep that they have said so; asked once."""
        with self._writing, self.sessions.begin() as session:
            if session.scalar(_rights_of(owner)) is None:
                session.add(Choice(owner=owner, key=_RIGHTS, value=str(time.time())))

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
            UserError: when no photo is usable, there are too many, a word is missing, or
                ``confirm_rights`` was not called for this owner.
        """
        words = _clean_words(name, class_name, trigger)
        id = self._begin(owner, draft=False, **words)
        try:
            unusable = self.add_photos(owner, id, files)
            subject = self.get(owner, id)
            if not subject.photos:
                told = "; ".join(f"{check.photo} {check.reason}" for check in unusable)
                raise UserError(f"no photo can be used: {told or 'none was given'}")
        except BaseException:
            self._erase(id)
            raise
        return subject, unusable + self.checks(owner, id)

    def draft(self, owner: str) -> SubjectView:
        """The subject that this owner has begun with and not saved; an empty one if there is none.

        Photos and captions are added to it as to any other; ``save`` makes it one of ``all``.
        """
        with self._writing:
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
            row = _owned(session, owner, id)
            if row.draft:
                limit = 2 * NAME_LIMIT  # too long a name is told when it is saved
                row.name, row.class_name, row.trigger = (
                    text[:limit] for text in (name, class_name, trigger)
                )

    def save(self, owner: str, id: str, name: str, class_name: str, trigger: str) -> SubjectView:
        """Give a subject its words; a draft becomes one of ``all``.

        Raises:
            UserError: when a word is missing, there is no photo, or ``confirm_rights`` was not
                called for this owner.
        """
        words = _clean_words(name, class_name, trigger)
        self._require_rights(owner)
        with self.sessions.begin() as session:
            row = _owned(session, owner, id)
            if not row.photos:
                raise UserError("photos: none yet; give 3 to 20 photos of the subject")
            row.name, row.class_name, row.trigger = words.values()
            if row.draft:
                row.draft, row.created_at = False, time.time()
            return self._view(row)

    def add_photos(self, owner: str, id: str, files: Sequence[tuple[Path, str]]) -> list[Check]:
        """Copy uploaded photos into a subject.

        Returns:
            Those that cannot be used, with the reason; all others were added.

        Raises:
            UserError: when that would be too many photos or bytes, or ``confirm_rights`` was not
                called for this owner; then none was added.
        """
        self._require_rights(owner)
        given = [(self.folder.uploaded(path), _shown_name(name)) for path, name in files]
        self._check_room(self.get(owner, id), [path for path, _ in given])
        looks = [(path, name, look_at(path)) for path, name in given]
        unusable = [Check(name, "unusable", look) for _, name, look in looks if type(look) is str]
        with self._writing:
            usable = [(path, name, look) for path, name, look in looks if type(look) is Examined]
            self._check_room(self.get(owner, id), [path for path, _, _ in usable])
            for path, name, look in usable:
                self._add(owner, id, path, name, look)
        return unusable

    def remove_photo(self, owner: str, id: str, photo_id: str) -> None:
        """Delete a photo for good, with its caption and every copy.

        Raises:
            UserError: when it is the last one of a saved subject, or training uses it.
        """
        with self._writing:
            self._refuse_while_training(id)
            with self.sessions.begin() as session:
                row = _owned(session, owner, id)
                photo = _photo_of(row, photo_id)
                if len(row.photos) == 1 and not row.draft:
                    raise UserError(
                        "this is the last photo of the subject; add another one first, or delete "
                        "the subject"
                    )
                row.photos.remove(photo)
            forget_deleted_rows(self.sessions)
            self.files.remove_photo(photo)

    def set_caption(self, owner: str, id: str, photo_id: str, text: str) -> None:
        """Describe a photo; "" takes the description away.

        Raises:
            UserError: when it is longer than ``CAPTION_LIMIT``.
        """
        caption = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
        if len(caption) > CAPTION_LIMIT:
            raise UserError(f"the caption has {len(caption)} letters; give at most {CAPTION_LIMIT}")
        with self._writing, self.sessions.begin() as session:
            photo = _photo_of(_owned(session, owner, id), photo_id)
            photo.caption = caption
            self.files.write_caption(photo)

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
            return self._view(_owned(session, owner, id))

    def photos_folder(self, owner: str, id: str) -> Path:
        """Folder with photos and captions, as ``data.subject`` takes it."""
        return self.files.photos(self.get(owner, id).id)

    def checks(self, owner: str, id: str, resolution_px: int = 512) -> list[Check]:
        """What is wrong with the photos of a subject, for pictures of that many px a side."""
        with self.sessions() as session:
            row = _owned(session, owner, id)
            found = {photo.shown_name: _as_found(photo) for photo in row.photos}
        return check_photos(found, resolution_px)

    def cropped(self, owner: str, id: str, photo_id: str, resolution_px: int) -> Path:
        """The square of a photo that a base of that resolution learns from, as a picture file."""
        if resolution_px not in RESOLUTIONS_PX:
            raise UserError(f"{resolution_px} px: choose one of {RESOLUTIONS_PX}")
        with self.sessions() as session:
            photo = _photo_of(_owned(session, owner, id), photo_id)
        return self.files.cropped(photo, resolution_px)

    # --- the bin

    def delete(self, owner: str, id: str) -> None:
        """Put a subject into the bin; of a draft nothing is kept."""
        if self.get(owner, id).draft:
            self.purge(owner, id)
            return
        with self.sessions.begin() as session:
            _owned(session, owner, id).deleted_at = time.time()

    def restore(self, owner: str, id: str) -> None:
        """Take a subject out of the bin.

        Raises:
            UserError: when it is not there.
        """
        with self.sessions.begin() as session:
            _owned(session, owner, id, in_bin=True).deleted_at = None

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
            _owned(session, owner, id, in_bin=row is None or not row.draft)
        self._refuse_while_training(id)
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
            if not self._is_training(id):
                self._erase(id)
        forget_deleted_rows(self.sessions)  # also of what was changed since

    def tidy(self) -> None:
        """Remove what a crash left half done: files that no photo stands for."""
        with self._writing, self.sessions() as session:
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

    def _add(self, owner: str, id: str, source: Path, name: str, look: Examined) -> None:
        with self.sessions.begin() as session:
            row = _owned(session, owner, id)
            taken = {photo.shown_name for photo in row.photos}
            number = max((photo.position for photo in row.photos), default=0) + 1
            width, height = look.photo.size
            photo = Photo(
                id=new_id(),
                position=number,
                file_name=f"photo-{number:03}{look.suffix}",
                shown_name=_unused(name, taken),
                digest=look.photo.digest,
                width=width,
                height=height,
                look=None if look.photo.look is None else f"{look.photo.look:016x}",
                sharpness=look.photo.sharpness,
                caption="",
            )
            row.photos.append(photo)
            session.flush()
            self.files.add(photo, source, look.thumbnail)

    def _erase(self, id: str) -> None:
        with self._writing:
            with self.sessions.begin() as session:
                row = session.get(Subject, id)
                runs = list(session.scalars(select(Job.id).where(Job.subject_id == id)))
                if row is not None:
                    session.delete(row)
            forget_deleted_rows(self.sessions)
            self.files.erase(id, runs)  # after the row: what a crash leaves, ``tidy`` removes

    def _check_room(self, subject: SubjectView, more: Sequence[Path]) -> None:
        count = len(subject.photos) + len(more)
        if count > images.SUBJECT_LIMIT:
            raise UserError(
                f"that would be {count} photos; a subject has at most {images.SUBJECT_LIMIT}, so "
                "give the best ones"
            )
        size = sum(path.stat().st_size for path in (*more, *(p.path for p in subject.photos)))
        if size > SUBJECT_LIMIT_BYTES:
            raise UserError(
                f"that would be {size / 2**20:.0f} MB; the photos of a subject have at most "
                f"{SUBJECT_LIMIT_BYTES // 2**20} MB together"
            )

    def _require_rights(self, owner: str) -> None:
        if not self.has_rights(owner):
            raise UserError(_NO_RIGHTS)

    def _is_training(self, id: str) -> bool:
        running = select(Job).where(Job.subject_id == id, Job.state.in_(("running", "stopping")))
        with self.sessions() as session:
            return session.scalar(running) is not None

    def _refuse_while_training(self, id: str) -> None:
        if self._is_training(id):
            raise UserError("training is running with these photos; stop it first")

    def _list(self, owner: str, *conditions: object) -> list[SubjectView]:
        wanted = select(Subject).where(Subject.owner == owner, *conditions)  # pyright: ignore
        with self.sessions() as session:
            rows = session.scalars(wanted.order_by(Subject.created_at.desc()))
            return [self._view(row) for row in rows]

    def _view(self, row: Subject) -> SubjectView:
        photos = [
            PhotoView(
                id=photo.id,
                shown_name=photo.shown_name,
                path=self.files.photo(photo),
                size=(photo.width, photo.height),
                caption=photo.caption,
                thumbnail=self.files.thumbnail(photo),
            )
            for photo in row.photos
        ]
        return SubjectView(
            row.id, row.name, row.class_name, row.trigger, row.created_at, tuple(photos),
            row.draft, row.deleted_at,
        )  # fmt: skip


def _owned(session: Session, owner: str, id: str, in_bin: bool = False) -> Subject:
    return owned(session, Subject, "subject", owner, id, in_bin)


def _photo_of(subject: Subject, photo_id: str) -> Photo:
    for photo in subject.photos:
        if photo.id == photo_id:
            return photo
    raise UserError("this photo is not there any more; load the page again")


def _as_found(photo: Photo) -> images.Photo:
    return images.Photo(
        path=Path(photo.file_name),
        size=(photo.width, photo.height),
        digest=photo.digest,
        look=None if photo.look is None else int(photo.look, 16),
        sharpness=photo.sharpness,
    )


def _rights_of(owner: str):
    return select(Choice.id).where(Choice.owner == owner, Choice.key == _RIGHTS)


def _clean_words(name: str, class_name: str, trigger: str) -> dict[str, str]:
    given = {"name": name, "class word": class_name, "trigger word": trigger}
    cleaned = [clean_name(text, what) for what, text in given.items()]
    return dict(zip(("name", "class_name", "trigger"), cleaned, strict=True))


def _shown_name(name: str) -> str:
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    try:
        return clean_name(last[-NAME_LIMIT:], "photo")
    except UserError:
        return "photo"


def _unused(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found
