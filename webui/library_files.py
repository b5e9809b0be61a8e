"""Where the files of adapters lie, and removing them with every copy."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from webui.bin import remove_copies
from webui.models import Adapter
from webui.paths import DataFolder, new_id
from webui.photos import THUMBNAIL_PX, write_picture

NATIVE, LORA, CARD = "adapter.safetensors", "pytorch_lora_weights.safetensors", "README.md"
"""Files of a finished run that are kept with its adapter, under the same names."""
IMPORTED = "imported.safetensors"
_THUMBNAIL = "thumbnail.webp"


class LibraryFiles:
    """Of each adapter, ``adapters/ID`` holds the file itself, what its run left beside it, and a
    thumbnail; ``exports/ID`` holds the files that people downloaded.
    """  # noqa: D205

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder

    def home(self, id: str) -> Path:
        """All files of an adapter but its exports."""
        return self.folder.of("adapters", id)

    def exports(self, id: str) -> Path:
        """What was made of it to be downloaded."""
        return self.folder.of("exports", id)

    def adapter(self, row: Adapter) -> Path:
        """The adapter file itself."""
        return self.home(row.id) / row.file_name

    def thumbnail(self, id: str) -> Path | None:
        """A picture of what it draws, if there is one."""
        return _existing(self.home(id) / _THUMBNAIL)

    def card(self, id: str) -> Path | None:
        """Its model card, if it came with one."""
        return _existing(self.home(id) / CARD)

    def take_run(self, id: str, run: Path) -> None:
        """Copy what a finished run left; exports of an earlier state of it are forgotten."""
        home = self.home(id)
        home.mkdir(exist_ok=True)
        for name in (NATIVE, LORA, CARD):
            copy_whole(run / name, home / name)
        example = min((run / "samples").glob("[0-9]*-seed*.png"), default=None)
        if example is not None:
            with Image.open(example) as image:
                image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
                write_picture(image.convert("RGB"), home / _THUMBNAIL)
        shutil.rmtree(self.exports(id), ignore_errors=True)

    def take_import(self, id: str, source: Path) -> None:
        """Copy a file that somebody uploaded."""
        self.home(id).mkdir()
        shutil.copyfile(source, self.home(id) / IMPORTED)

    def erase(self, id: str) -> None:
        """Remove everything of an adapter; its run stays."""
        folders = (self.home(id), self.exports(id))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        remove_copies(self.folder, files)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def tidy(self, known: Collection[str]) -> None:
        """Remove what a crash has left: folders of ids that the database does not know."""
        for part in ("adapters", "exports"):
            for path in self.folder.part(part).iterdir():
                if path.name not in known:
                    shutil.rmtree(path)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, if there is one, so that its name never stands for half of it."""
    if source.is_file():
        unfinished = target.with_name(f".{target.name}.{new_id()}")
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
