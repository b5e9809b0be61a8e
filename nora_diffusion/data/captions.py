"""Captions of photos, in the files that people who train diffusion models have beside them.

First found, first taken: ``NAME.txt``, ``NAME.caption`` (sd-scripts' default), ``NAME.json`` with a
caption in it, then one table for the whole folder: ``metadata.jsonl`` or ``metadata.csv`` (Hugging
Face's imagefolder: a ``file_name`` and a text in each row), ``captions.json`` (name to text).
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nora_diffusion.config import UserError

FIELDS = ("caption", "text", "prompt")
"""Where a record keeps its caption: ours and ai-toolkit's, imagefolder's, diffusers' DreamBooth."""


def read_captions(photos: Sequence[Path]) -> tuple[dict[Path, str], set[Path]]:
    """Captions of the photos of one folder, and the files that were read for them.

    An empty caption counts as none. White space is collapsed.

    Raises:
        UserError: when a file of captions is not UTF-8 or not what its name says.
    """
    found: dict[Path, str] = {}
    used: set[Path] = set()
    for folder in {photo.parent for photo in photos}:
        for table in (_captions_json, _metadata_csv, _metadata_jsonl):  # later ones go before
            captions, path = table(folder)
            named = {photo: captions[name] for photo in photos if (name := _named(photo, captions))}
            found |= {photo: text for photo, text in named.items() if text}
            used |= {path} if named else set()
    for photo in photos:
        for path in (photo.with_suffix(suffix) for suffix in (".txt", ".caption", ".json")):
            caption = _own_caption(path) if path.is_file() and path != photo else None
            if caption is None:
                continue
            used.add(path)
            if caption:
                found[photo] = caption
                break
    return found, used


def _own_caption(path: Path) -> str | None:
    """Text of a photo's own file; None where a JSON file holds no caption (but camera data)."""
    if path.suffix != ".json":
        return _tidy(_read(path))
    record = _parse(_read(path), str(path))
    text = record if isinstance(record, str) else _text_of(record)
    return None if text is None else _tidy(text)


def _metadata_jsonl(folder: Path) -> tuple[dict[str, str], Path]:
    path = folder / "metadata.jsonl"
    lines = _read(path).splitlines() if path.is_file() else []
    rows = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return _table(rows, path), path


def _metadata_csv(folder: Path) -> tuple[dict[str, str], Path]:
    path = folder / "metadata.csv"
    lines = _read(path).splitlines() if path.is_file() else []
    return _table(csv.DictReader(lines), path), path


def _captions_json(folder: Path) -> tuple[dict[str, str], Path]:
    path = folder / "captions.json"
    content = _parse(_read(path), str(path)) if path.is_file() else {}
    if isinstance(content, list):
        return _table(content, path), path
    if not isinstance(content, dict):
        raise UserError(f'{path}: must be {{"photo.jpg": "its caption", ...}}')
    texts = {name: v if isinstance(v, str) else _text_of(v) for name, v in content.items()}
    return {Path(name).name: _tidy(text) for name, text in texts.items() if text is not None}, path


def _table(rows: Iterable[Any], path: Path) -> dict[str, str]:
    """File name to caption of records with a ``file_name``."""
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name, text = (row.get("file_name"), _text_of(row)) if isinstance(row, dict) else (None,) * 2
        if not isinstance(name, str) or text is None:
            raise UserError(
                f"{path}, row {number}: must have a file_name and one of {', '.join(FIELDS)}"
            )
        captions[Path(name).name] = _tidy(text)
    return captions


def _named(photo: Path, captions: Mapping[str, str]) -> str | None:
    """The name under which a table has a photo: with its ending, or without (sd-scripts)."""
    return next((name for name in (photo.name, photo.stem) if name in captions), None)


def _text_of(record: Any) -> str | None:
    """The caption of a record, "" where it is there and null."""
    if not isinstance(record, dict):
        return None
    value = next((record[field] for field in FIELDS if field in record), None)
    if value is None and any(field in record for field in FIELDS):
        return ""
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"the caption {path} is not UTF-8 text; save it as UTF-8") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"the captions in {where}: not JSON ({error})") from None


def _tidy(text: str) -> str:
    return " ".join(text.split())
