"""Sheets of pictures: labelled grids, and before beside after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_GAP_PX, _GUTTER_PX = 4, 170  # between tiles, and for the labels of rows


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    tile_px: int | None = None,
) -> Image.Image:
    """Lay pictures out in a labelled grid on white.

    Args:
        rows: rows of pictures, of any lengths; None leaves a gap.
        row_labels: text left of each row, wrapped.
        column_labels: text above each column, wrapped.
        title: text above all.
        tile_px: side of a tile, into which pictures are fitted; None: their own size, between
            128 and 256.
    """
    largest = max((max(image.size) for row in rows for image in row if image), default=128)
    tile = tile_px or min(256, max(128, largest))
    font = ImageFont.load_default(14)
    gap, line = _GAP_PX, 18
    gutter = _GUTTER_PX if any(row_labels) else 0
    columns = max((len(row) for row in rows), default=0)
    letters = max(4, int(tile / font.getlength("n")))
    heads = ["\n".join(textwrap.wrap(label, letters)) for label in column_labels]
    above = max((head.count("\n") + 1 for head in heads if head), default=0)
    top = gap + line * (bool(title) + above)
    width = gutter + gap + columns * (tile + gap)
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap // 2), _drawable(title, font), fill="black", font=font)
    for index, head in enumerate(heads):
        place = (gutter + gap + index * (tile + gap), top - line * above)
        draw.multiline_text(place, _drawable(head, font), fill="black", font=font)
    for index, row in enumerate(rows):
        y = top + index * (tile + gap)
        if index < len(row_labels):
            lines = textwrap.wrap(row_labels[index], 24)[: tile // line]
            text = _drawable("\n".join(lines), font)
            draw.multiline_text((gap, y), text, fill="black", font=font)
        for column, image in enumerate(row):
            if image is not None:
                _paste(sheet, image, (gutter + gap + column * (tile + gap), y), tile)
    return sheet


def before_after_sheet(
    photos: Sequence[Image.Image],
    prompts: Sequence[str],
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
) -> Image.Image:
    """The subject's photos, then for each prompt the base's pictures beside the adapted ones.

    Args:
        photos: of the subject, in one row.
        prompts: one a row.
        before: for each prompt the base's pictures.
        after: for each prompt the adapted model's, with the same seeds.
    """
    tile = min(256, max(128, *(max(image.size) for row in before for image in row)))
    old = contact_sheet(before, prompts, ["before (base)"], tile_px=tile)
    new = contact_sheet(after, [], ["after (NoRA)"], tile_px=tile)
    compared = Image.new("RGB", (old.width + new.width + 12, old.height), "white")
    compared.paste(old, (0, 0))
    compared.paste(new, (old.width + 12, 0))
    room = (compared.width - _GUTTER_PX - _GAP_PX) // max(1, len(photos)) - _GAP_PX
    strip = contact_sheet([photos], ["your photos"], tile_px=max(32, min(tile, room)))
    sheet = Image.new("RGB", (compared.width, strip.height + 8 + compared.height), "white")
    sheet.paste(strip, (0, 0))
    sheet.paste(compared, (0, strip.height + 8))
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, place: tuple[int, int], tile: int) -> None:
    scale = tile / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    fitted = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
    sheet.paste(fitted, (place[0] + (tile - size[0]) // 2, place[1] + (tile - size[1]) // 2))


def _drawable(text: str, font: Any) -> str:
    # Pillow built without FreeType has only a Latin-1 bitmap font.
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")
