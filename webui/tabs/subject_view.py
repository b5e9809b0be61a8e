"""What the tab "Subject" shows, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from webui.bin import days_left
from webui.messages import as_text
from webui.photos import Check
from webui.subject_photos import CAPTION_LIMIT
from webui.subjects import SubjectView
from webui.tabs.pieces import Action, actions, bin_actions, card, cards, count, day, note, picture


def photos_html(subject: SubjectView, checks: Sequence[Check]) -> str:
    """The photos with what is wrong with them, those that could not be used above."""
    general = [one for one in checks if not one.photo or one.level == "unusable"]
    lines = [
        f'<li class="n-{one.level}"><strong>{as_text(one.photo)}</strong> '
        f"{as_text(one.reason)}</li>"
        for one in general
    ]
    listed = f'<ul class="n-checks" role="status">{"".join(lines)}</ul>' if lines else ""
    if not subject.photos:
        return listed + note(
            "No photos yet. Choose sharp ones of one thing alone, from several sides, in several "
            "places: JPEG, PNG, WebP or HEIC."
        )
    figures = []
    for photo in subject.photos:
        wrong = [one.reason for one in checks if one.photo == photo.shown_name]
        reasons = "".join(f'<p class="n-warning">{as_text(reason)}</p>' for reason in wrong)
        remove = actions(Action("remove", "Remove", photo.id, photo.shown_name))
        figures.append(
            f'<li class="n-photo">{picture(photo.thumbnail, photo.shown_name)}'
            f"<p><strong>{as_text(photo.shown_name)}</strong></p>"
            f"<p>{photo.size[0]} × {photo.size[1]} px</p>{reasons}{remove}</li>"
        )
    return f'{listed}<ul class="n-photos">{"".join(figures)}</ul>'


def captions_html(subject: SubjectView) -> str:
    """A field for the caption of each photo."""
    if not subject.photos:
        return note("A caption can be written for each photo when there is one.")
    rows = []
    for photo in subject.photos:
        caption, name = as_text(photo.caption), as_text(photo.shown_name)
        rows.append(
            f'<li class="n-caption">{picture(photo.thumbnail, "")}<label>{name}'
            f'<textarea rows="2" data-id="{photo.id}" value="{caption}" '
            f'maxlength="{CAPTION_LIMIT}" '
            f'placeholder="a {{trigger}} {{class_name}}">{caption}</textarea></label></li>'
        )
    why = note(
        "Where a photo has none, “a TRIGGER CLASS” stands for it. Say what is around the subject, "
        "with {trigger} and {class_name} for the subject itself. Kept as you leave the field."
    )
    return f'{why}<ul class="n-captions">{"".join(rows)}</ul>'


def preview_html(path: Path, name: str, px: int) -> str:
    """A photo as it is learnt from."""
    pixels = ' class="n-pixels"' if px < 256 else ""
    alt = f"{name}, cut to {px} × {px} px"
    return (
        f"<figure{pixels}>{picture(path, alt)}<figcaption>{as_text(alt)}: the middle, scaled. "
        "data.crop and data.buckets change that (Train, Advanced).</figcaption></figure>"
    )


def list_html(subjects: Sequence[SubjectView], open_id: str) -> str:
    """The saved subjects, with a cover."""
    items = []
    for one in subjects:
        cover = picture(one.photos[0].thumbnail, "")
        lines = [f"{one.trigger} {one.class_name}", count(len(one.photos), "photo")]
        opened = actions(Action("open", "Edit", one.id, one.name))
        items.append(
            card(cover, one.name, [*lines, day(one.created_at)], opened, one.id == open_id)
        )
    return cards(items, "None saved yet. Begin with photos and a name.")


def bin_html(subjects: Sequence[SubjectView]) -> str:
    """Deleted subjects, and how long they can be put back."""
    items = []
    for one in subjects:
        left = f"gone for good in {count(days_left(one.deleted_at or 0), 'day')}"
        buttons = bin_actions(one.id, one.name)
        cover = picture(one.photos[0].thumbnail, "") if one.photos else ""
        items.append(card(cover, one.name, [count(len(one.photos), "photo"), left], buttons))
    return cards(items, "Empty. What you delete stays here for 30 days.")
