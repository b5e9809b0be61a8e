"""The photos of a subject: adding and removing them, their captions, what is wrong with them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nora_diffusion.config import UserError
from nora_diffusion.data import images
from webui.bin import forget_deleted_rows, owned
from webui.database import Sessions
from webui.dispatcher import is_working
from webui.models import Photo, Subject
from webui.paths import NAME_LIMIT, clean_name, new_id
from webui.photos import RESOLUTIONS_PX, Check, Examined, check_photos, look_at
from webui.rights import Rights
from webui.subject_files import SubjectFiles

SUBJECT_LIMIT_BYTES = 200 * 2**20
CAPTION_LIMIT = 1000
"""Letters; the text encoders of the bases read 77 to 512 tokens."""


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


class SubjectPhotos:
    """The photos of all subjects and drafts; every method takes whose subject it is, and which.

    Methods raise ``UserError`` when this owner has no such subject, or it is in the bin.
    """

    def __init__(self, files: SubjectFiles, sessions: Sessions, rights: Rights) -> None:
        self.files = files
        self.sessions = sessions
        self.rights = rights
        self.writing = threading.RLock()
        """Held over every change: photos are numbered and counted one upload at a time."""

    def add(self, owner: str, id: str, files: Sequence[tuple[Path, str]]) -> list[Check]:
        """Copy uploaded photos into a subject.

        Args:
            owner: whose it is.
            id: of the subject.
            files: paths inside ``uploads`` and the names they came with.

        Returns:
            Those that cannot be used, with the reason; all others were added.

        Raises:
            UserError: when that would be too many photos or bytes, or this owner has not confirmed
                their rights; then none was added.
        """
        self.rights.require(owner)
        given = [(self.files.folder.uploaded(path), _shown_name(name)) for path, name in files]
        self._check_room(owner, id, [path for path, _ in given])
        looks = [(path, name, look_at(path)) for path, name in given]
        unusable = [Check(name, "unusable", look) for _, name, look in looks if type(look) is str]
        with self.writing:
            usable = [(path, name, look) for path, name, look in looks if type(look) is Examined]
            self._check_room(owner, id, [path for path, _, _ in usable])
            for path, name, look in usable:
                self._add(owner, id, path, name, look)
        return unusable

    def remove(self, owner: str, id: str, photo_id: str) -> None:
        """Delete a photo for good, with its caption and every copy.

        Raises:
            UserError: when it is the last one of a saved subject, or training uses it.
        """
        with self.writing:
            self.refuse_while_training(id)
            with self.sessions.begin() as session:
                row = owned(session, Subject, owner, id)
                photo = _find(row, photo_id)
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
        with self.writing, self.sessions.begin() as session:
            photo = _find(owned(session, Subject, owner, id), photo_id)
            photo.caption = caption
            self.files.write_caption(photo)

    def checks(self, owner: str, id: str, resolution_px: int = 512) -> list[Check]:
        """What is wrong with the photos of a subject, for pictures of that many px a side."""
        with self.sessions() as session:
            row = owned(session, Subject, owner, id)
            found = {photo.shown_name: _as_found(photo) for photo in row.photos}
        return check_photos(found, resolution_px)

    def cropped(self, owner: str, id: str, photo_id: str, resolution_px: int) -> Path:
        """The square of a photo that a base of that resolution learns from, as a picture file."""
        if resolution_px not in RESOLUTIONS_PX:
            raise UserError(f"{resolution_px} px: choose one of {RESOLUTIONS_PX}")
        with self.sessions() as session:
            photo = _find(owned(session, Subject, owner, id), photo_id)
        return self.files.cropped(photo, resolution_px)

    def refuse_while_training(self, id: str) -> None:
        """Go on only while no training reads the photos of a subject, whosever it is.

        Raises:
            UserError: when one does.
        """
        if is_working(self.sessions, id):
            raise UserError("training is running with these photos; stop it first")

    def view(self, photo: Photo) -> PhotoView:
        """A photo as it is shown."""
        return PhotoView(
            id=photo.id,
            shown_name=photo.shown_name,
            path=self.files.photo(photo),
            size=(photo.width, photo.height),
            caption=photo.caption,
            thumbnail=self.files.thumbnail(photo),
        )

    def _add(self, owner: str, id: str, source: Path, name: str, look: Examined) -> None:
        with self.sessions.begin() as session:
            row = owned(session, Subject, owner, id)
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

    def _check_room(self, owner: str, id: str, more: Sequence[Path]) -> None:
        with self.sessions() as session:
            there = [self.files.photo(p) for p in owned(session, Subject, owner, id).photos]
        count = len(there) + len(more)
        if count > images.SUBJECT_LIMIT:
            raise UserError(
                f"that would be {count} photos; a subject has at most {images.SUBJECT_LIMIT}, so "
                "give the best ones"
            )
        size = sum(path.stat().st_size for path in (*more, *there))
        if size > SUBJECT_LIMIT_BYTES:
            raise UserError(
                f"that would be {size / 2**20:.0f} MB; the photos of a subject have at most "
                f"{SUBJECT_LIMIT_BYTES // 2**20} MB together"
            )


def _find(subject: Subject, photo_id: str) -> Photo:
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
