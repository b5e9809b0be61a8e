"""The gallery: every picture that was drawn, with its settings; and settings out of a PNG."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select

from nora_diffusion.config import UserError
from webui.bin import forget_deleted_rows, remove_copies
from webui.database import Sessions
from webui.models import Picture
from webui.paths import DataFolder
from webui.protocol import SETTINGS_KEY

_SETTINGS_LETTERS = 64 * 1024

Text = Annotated[str, Field(max_length=4000)]
Side = Annotated[int, Field(ge=8, le=4096)]
_GIVEN = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class UsedAdapter(BaseModel):
    """An adapter of a picture; only its id is looked up, and only among the reader's own."""

    model_config = _GIVEN
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    name: str = Field("", max_length=200)
    weight: float = Field(ge=-1000, le=1000)


class PictureSettings(BaseModel):
    """What a picture says of how it was drawn; it may come from anybody, so nothing is trusted."""

    model_config = _GIVEN
    prompt: Text
    negative_prompt: Text = ""
    seed: int = Field(ge=-(2**63), le=2**64 - 1)
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=-1000, le=1000)
    width: Side
    height: Side
    base: str = Field(max_length=200)
    adapters: list[UsedAdapter] = Field([], max_length=4)


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
        with self.sessions.begin() as session:
            row = Picture(id=path.stem, owner=owner, settings=settings)
            session.add(row)
            session.flush()
            return self._view(row)

    def all(self, owner: str, limit: int = 60) -> list[PictureView]:
        """Newest first; those whose file is gone are left out."""
        wanted = select(Picture).where(Picture.owner == owner).order_by(Picture.created_at.desc())
        with self.sessions() as session:
            found = [self._view(row) for row in session.scalars(wanted.limit(limit))]
        return [one for one in found if one.path.is_file()]

    def get(self, owner: str, id: str) -> PictureView:
        """One picture.

        Raises:
            UserError: when this owner has none of that id.
        """
        with self.sessions() as session:
            row = session.get(Picture, id)
            if row is None or row.owner != owner:
                raise UserError("there is no such picture any more; load the page again")
            return self._view(row)

    def delete(self, owner: str, id: str) -> None:
        """Delete a picture for good, with the copies that pages were shown.

        Raises:
            UserError: when this owner has none of that id.
        """
        path = self.get(owner, id).path
        with self.sessions.begin() as session:
            session.delete(session.get_one(Picture, id))
        forget_deleted_rows(self.sessions)
        if path.is_file():
            remove_copies(self.folder, [path])
            path.unlink()

    def tidy(self) -> None:
        """Remove what a crash left: files that nobody was shown. Call before anything is drawn."""
        with self.sessions() as session:
            ids = set(session.scalars(select(Picture.id)))
        for path in self.folder.part("pictures").iterdir():
            if path.stem not in ids:
                path.unlink()

    def _view(self, row: Picture) -> PictureView:
        path = self.folder.of("pictures", row.id, ".png")
        return PictureView(row.id, path, dict(row.settings), row.created_at)


def read_settings(path: Path) -> PictureSettings:
    """The settings inside a PNG that this app has written; the picture itself is not decoded.

    Raises:
        UserError: when it is no such file, or they are not settings that can be used.
    """
    foreign = UserError(
        "this picture holds no settings of this app: drop a PNG as it was saved here; programs "
        "that edit or send pictures often leave them out"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                text = image.info.get(SETTINGS_KEY)
    # Pillow's words for what is broken or too large (also of a text chunk) are of many types.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise foreign from error
    if not isinstance(text, str) or len(text) > _SETTINGS_LETTERS:
        raise foreign
    try:
        return PictureSettings.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise UserError(
            f"the settings inside this picture cannot be used: {where}: {problem['msg']}"
        ) from None
