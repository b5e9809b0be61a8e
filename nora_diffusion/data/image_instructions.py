"""Image instructions: records of a picture, a question and an answer, as chat messages.

Three spellings are read: ``{image, instruction, output}``, ``{image, messages: [{role, content}]}``
and LLaVA's ``{image, conversations: [{from, value}]}``.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nora_diffusion.data.images import read_image, register_heic
from nora_diffusion.data.instructions import read_rows
from nora_diffusion.settings import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NO_FILE = "no such file"
PLACEHOLDER = "<image>"  # LLaVA's mark in a text; the chat template sets the model's own


class PictureError(UserError):
    """A picture that is missing or cannot be decoded."""


@dataclass(frozen=True)
class Record:
    """One picture and the conversation about it.

    Attributes:
        image: its path.
        turns: (role, text), "user" and "assistant" by turns, beginning with "user".
    """

    image: Path
    turns: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1][1]

    def messages(self, n_turns: int | None = None) -> list[dict[str, Any]]:
        """The first `n_turns` turns as a processor's chat template takes them, picture first."""
        picture = {"type": "image", "image": open_image(self.image)}
        out = []
        for i, (role, text) in enumerate(self.turns[:n_turns]):
            content = [{"type": "text", "text": text}]
            out.append({"role": role, "content": [picture, *content] if i == 0 else content})
        return out


def open_image(path: Path) -> Image.Image:
    """Reads a picture as `images.read_image` does.

    Raises:
        PictureError: it is missing or no picture.
    """
    try:
        return read_image(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read as a picture ({error})") from None


def read_records(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """Reads a JSON list, or JSON lines, of image instructions.

    Args:
        path: the file.
        images: folder that image paths start from; None: the folder of the file.

    Raises:
        UserError: naming the first records that cannot be used, and why.
    """
    path = Path(path).expanduser()
    folder = path.parent if images is None else Path(images).expanduser()
    problems, records = [], []
    opened: set[Path] = set()  # a picture may be asked about often
    for number, entry in enumerate(read_rows(path), start=1):
        try:
            record = Record(folder / _text(entry, "image"), _turns(entry))
            if record.image not in opened:
                _check_picture(record.image)
                opened.add(record.image)
            records.append(record)
        except ValueError as error:
            problems.append(f"record {number}: {error}")
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: not all records can be used:\n  {shown}{more}")
    return records


def _check_picture(path: Path) -> None:
    """Of its first bytes alone; whether it is whole shows when it is decoded."""
    if not path.is_file():
        raise ValueError(f"image: {NO_FILE}: {path}")
    register_heic()
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path):
            pass
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"image: cannot be read as a picture: {path}") from None


def _text(entry: Any, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: missing or no text")
    return value


def _turns(entry: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    if "messages" in entry or "conversations" in entry:
        key, role, text = "messages", "role", "content"
        if "conversations" in entry:
            key, role, text = "conversations", "from", "value"
        if not isinstance(entry[key], list):
            raise ValueError(f"{key}: no list")
        turns = [(ROLES.get(_text(m, role), "?"), _text(m, text)) for m in entry[key]]
    else:
        question = _text(entry, "instruction")
        if entry.get("input"):
            question = f"{question}\n{_text(entry, 'input')}"
        turns = [("user", question), ("assistant", _text(entry, "output"))]
    _check_order(turns)
    return tuple((role, text.replace(PLACEHOLDER, "").strip()) for role, text in turns)


def _check_order(turns: Sequence[tuple[str, str]]) -> None:
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or len(turns) % 2 or [role for role, _ in turns] != expected:
        found = ", ".join(role for role, _ in turns)
        raise ValueError(
            f"turns must be user, assistant, by turns, and end with assistant; found {found}"
        )
