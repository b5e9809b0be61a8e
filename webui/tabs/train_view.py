"""What the form of the tab "Train" says in words and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nora_diffusion.families import built_in_version
from nora_diffusion.presets import find_preset
from nora_diffusion.settings import quote
from webui.bases import defaults
from webui.messages import as_text
from webui.tabs.pieces import count

NO_SUBJECT = (
    '<div class="run-empty"><strong>No subject yet.</strong>'
    "<p>Upload its photos in the tab Subject, then train here.</p></div>"
)


def preset_label(preset: str) -> str:
    """What a memory preset is called in the list."""
    return f"{preset.removesuffix('gb')} GB GPU"


def needs_html(base: str) -> str:
    """What a base model needs, in a sentence."""
    weights = defaults(base).model.base
    if built_in_version(weights):
        return "<p>Part of this program: nothing is downloaded, and any CPU will do.</p>"
    return (
        f"<p>Needs a GPU, and <code>{as_text(weights)}</code> from this machine or the Hugging "
        "Face hub, or other weights of its kind:</p>"
    )


def preset_html(preset: str) -> str:
    """A preset's choices with their reasons; "": nothing."""
    if not preset:
        return ""
    rows = "".join(
        f"<li><code>{choice.key} = {as_text(quote(choice.value))}</code> {as_text(choice.why)}</li>"
        for choice in find_preset(preset)
    )
    return f"<ul>{rows}</ul>"


def steps_html(steps: int, photos: int, by_photos: int) -> str:
    """Where the suggested steps are from, and what ``train.steps = "auto"`` would make of them.

    Args:
        steps: of the base's config.
        photos: of the subject.
        by_photos: steps by the number of photos.
    """
    rule = "" if by_photos == steps else f" By the number of photos it would be {by_photos}."
    return (
        f"<p>Suggested: {steps} steps, as in the config of this base.{rule} The subject has "
        f"{count(photos, 'photo')}.</p>"
    )


def changes_html(overrides: Mapping[str, Any]) -> str:
    """What differs from the settings of base and preset; nothing where nothing does."""
    shown = [f"<code>{key} = {as_text(quote(value))}</code>" for key, value in overrides.items()]
    return f"<p>Changed: {', '.join(shown)}</p>" if shown else ""
