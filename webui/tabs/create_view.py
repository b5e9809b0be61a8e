"""What the tab "Create" says in words and HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nora_diffusion.config import UserError
from nora_diffusion.families import locate
from webui.bases import bases, defaults
from webui.library import AdapterView
from webui.messages import as_text
from webui.pictures import PictureView
from webui.sampler import Drawn

COMPARED = (0.0, 1.0)
SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
CAPTION_LETTERS = 60
NO_ADAPTER = (
    '<div class="run-empty"><strong>No adapter yet.</strong><p>Upload photos in the tab Subject '
    "and train on them in the tab Train, or import a file in the tab Adapters. Until then the base "
    "model can be tried alone.</p></div>"
)


def settings_text(one: PictureView) -> str:
    """A picture's settings as a person reads them."""
    values = one.settings
    adapters = [f"{used['name']} ({used['weight']:g})" for used in values.get("adapters", [])]
    lines = {
        "Prompt": values.get("prompt"),
        "Negative prompt": values.get("negative_prompt"),
        "Adapters": ", ".join(adapters) or "none",
        "Strengths of the grid": ", ".join(f"{value:g}" for value in values.get("grid", [])),
        "Base model": values.get("base"),
        "Seed": values.get("seed"),
        "Steps": values.get("steps"),
        "Guidance": values.get("guidance"),
        "Size": f"{values.get('width')} x {values.get('height')} px",
        "Safety checker": values.get("safety_checker"),
    }
    told = [f"{name}: {value}" for name, value in lines.items() if value not in (None, "")]
    return "\n".join([*told, "AI-generated"])


def has_safety_checker(base: str) -> bool | None:
    """Whether a base model on this machine comes with a safety checker; None: not known yet."""
    try:
        source = locate(defaults(base).model.base if base in bases() else base)
        if isinstance(source, str):
            return None
        if source.is_file():
            return False
        index = json.loads((Path(source) / "model_index.json").read_text("utf-8"))
        return (index.get("safety_checker") or [None, None])[1] is not None
    except (UserError, OSError, ValueError, AttributeError):
        return None


def safety_html(base: str) -> str:
    """Whether what a base model draws is checked."""
    words = {
        True: "This base model has a safety checker, and it is on.",
        False: "This base model has no safety checker.",
        None: "Whether this base model has a safety checker is told after the first picture.",
    }
    return f'<p class="create-note">{words[has_safety_checker(base)]}</p>'


def problem_html(text: str) -> str:
    """Why nothing was drawn."""
    return f'<p class="problem" role="alert">{as_text(text)}</p>'


def told_html(drawn: Drawn) -> str:
    """How the pictures were drawn, and what the person should know of it."""
    notes, seeds = drawn.notes, [one["seed"] for one in drawn.settings]
    which = f"seed {seeds[0]}" if len(set(seeds)) == 1 else f"seeds {min(seeds)} to {max(seeds)}"
    checker = (
        "The base's safety checker is on."
        if notes["safety_checker"]
        else "This base model has no safety checker."
    )
    device = {"cpu": "the CPU", "cuda": "the GPU", "mps": "the GPU"}[notes["device"]]
    sentences = [f"Drawn on {device} in {notes['seconds']:.1f} s, {which}.", checker]
    warned = "".join(f"<p>{as_text(text)}</p>" for text in notes["warnings"])
    return f'<div class="create-note" role="status"><p>{" ".join(sentences)}</p>{warned}</div>'


def caption(settings: Mapping[str, Any]) -> str:
    """What stands below a picture of the gallery."""
    prompt = str(settings.get("prompt", ""))
    short = prompt if len(prompt) <= CAPTION_LETTERS else f"{prompt[:CAPTION_LETTERS]}…"
    weights = " ".join(f"{one['weight']:g}" for one in settings.get("adapters", []))
    if "grid" in settings:
        return f"{short}, {'comparison' if len(settings['grid']) == len(COMPARED) else 'sweep'}"
    strength = f", strength {weights}" if weights else ""
    return f"{short}{strength}, seed {settings.get('seed')}"


def sheet_caption(strengths: tuple[float, ...]) -> str:
    """What stands below a sheet of several strengths."""
    return "base and adapted, same seeds" if strengths == COMPARED else "strengths side by side"


def example(adapter: AdapterView | None) -> str:
    """A prompt to begin with."""
    if adapter is None or not adapter.trigger:
        return "a flower on the beach"
    return f"a {adapter.trigger} {adapter.class_name or ''}".rstrip() + " on the beach"


def base_label(base: str) -> str:
    """What a base model is called in messages: a path by its last part."""
    return Path(base).name if Path(base).is_absolute() else base
