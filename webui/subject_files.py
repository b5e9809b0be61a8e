"""Where the files of subjects lie, and removing them with every copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from webui.bin import remove_copies
from webui.models import Photo
from webui.paths import DataFolder
from webui.photos import write_cropped, write_picture

BEFORE_AFTER = "before_after.png"
"""The picture in a run folder that shows the photos."""


class SubjectFiles:
    """Of each subject, ``subjects/ID`` holds ``photos`` (with captions, as the trainer reads them),
    ``thumbnails`` and ``cropped`` (pictures of ours, without what the camera wrote).
    """  # noqa: D205

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder

    def home(self, id: str) -> Path:
        """All files of a subject."""
        return self.folder.of("subjects", id)

    def photos(self, id: str) -> Path:
        """Photos and captions, as ``data.subject`` takes them."""
        return self.home(id) / "photos"

    def photo(self, photo: Photo) -> Path:
        """The photo as it came."""
        return self.photos(photo.subject_id) / photo.file_name

    def thumbnail(self, photo: Photo) -> Path:
        """A small picture of it."""
        return self.home(photo.subject_id) / "thumbnails" / f"{photo.id}.webp"

    def cropped(self, photo: Photo, resolution_px: int) -> Path:
        """The square that it becomes for a base of that resolution."""
        path = self.home(photo.subject_id) / "cropped" / f"{photo.id}-{resolution_px}.webp"
        if not path.is_file():
            write_cropped(self.photo(photo), resolution_px, path)
        return path

    def add(self, photo: Photo, source: Path, thumbnail: Image.Image) -> None:
        """Copy a photo in."""
        write_picture(thumbnail, self.thumbnail(photo))
        shutil.copyfile(source, self.photo(photo))

    def write_caption(self, photo: Photo) -> None:
        """Put its caption beside a photo; nothing where there is none."""
        path = self.photo(photo).with_suffix(".txt")
        if photo.caption:
            unfinished = self.home(photo.subject_id) / path.name  # not yet among the photos
            unfinished.write_text(photo.caption, encoding="utf-8")
            unfinished.replace(path)
        else:
            path.unlink(missing_ok=True)

    def remove_photo(self, photo: Photo) -> None:
        """Remove a photo with everything made of it."""
        made = (self.home(photo.subject_id) / "cropped").glob(f"{photo.id}-*")
        path = self.photo(photo)
        files = [path, path.with_suffix(".txt"), self.thumbnail(photo), *made]
        files = [file for file in files if file.is_file()]
        remove_copies(self.folder, files)
        for file in files:
            file.unlink()
        self._remove_latents(photo.subject_id)

    def erase(self, id: str, runs: Iterable[str]) -> None:
        """Remove everything of a subject, and what of its runs shows the photos."""
        home = self.home(id)
        shown = [self.folder.of("runs", run) / BEFORE_AFTER for run in runs]
        shown = [path for path in shown if path.is_file()]
        remove_copies(self.folder, [*(f for f in home.rglob("*") if f.is_file()), *shown])
        for path in shown:
            path.unlink()
        self._remove_latents(id)
        shutil.rmtree(home, ignore_errors=True)

    def tidy(self, known: Mapping[str, set[str]]) -> None:
        """Remove what a crash has left: photos and subjects that the database does not know.

        Args:
            known: stems of the photos' names by the id of their subject.
        """
        for home in self.folder.part("subjects").iterdir():
            if home.name not in known:
                shutil.rmtree(home)
                continue
            for file in self.photos(home.name).glob("*"):
                if file.stem not in known[home.name]:
                    file.unlink()

    def _remove_latents(self, id: str) -> None:
        shutil.rmtree(self.folder.of("latents", id), ignore_errors=True)
