"""The base models that people choose from, and which others may be used."""

from __future__ import annotations

from pathlib import Path

from nora_diffusion.config import DreamboothConfig, UserError, load_config, shipped_configs
from nora_diffusion.families import ASSETS, locate
from webui.paths import PARTS

LABELS = {
    "mini": "mini: built in, 64 px, runs on any CPU",
    "mini-128": "mini-128: built in, 128 px, clearer and slower than mini",
    "sd15": "Stable Diffusion 1.5, 512 px",
    "sd2": "Stable Diffusion 2.1, 512 px",
    "sdxl": "Stable Diffusion XL, 1024 px",
    "sd3": "Stable Diffusion 3 medium",
    "sd35": "Stable Diffusion 3.5 medium",
    "flux": "Flux.1 dev",
    "flux2_klein": "Flux.2 klein 4B",
    "z_image": "Z-Image",
    "pixart": "PixArt-Sigma, 1024 px",
    "sana": "Sana 1.5, 1.6B",
}


def bases() -> dict[str, str]:
    """Name of each shipped config to what it is called on the page, the built-in ones first."""
    names = sorted(shipped_configs(), key=lambda name: (not name.startswith("mini"), name))
    return {name: LABELS.get(name, name) for name in names}


def base_choices() -> list[tuple[str, str]]:
    """The same, as components to choose from take it."""
    return [(label, name) for name, label in bases().items()]


def defaults(config: str, preset: str | None = None) -> DreamboothConfig:
    """The settings of a shipped config before anybody changes them, for an unnamed subject."""
    path = shipped_configs()[config]
    return load_config(path, ["data.subject=.", "data.class_name=subject"], preset)


def config_of(base: str) -> str | None:
    """The shipped config that is called like a base model, or trains on it; None: neither."""
    shipped = shipped_configs()
    if base in shipped:
        return base
    return next((name for name in shipped if defaults(name).model.base == base), None)


def usable_base(base: str, *, paths: bool) -> str | None:
    """A base model as it can be loaded later: built in, from the hub, or of this machine.

    Args:
        base: of a file or a person; it may lead anywhere.
        paths: whether a path on this machine may be one.

    Returns:
        Its name, hub id or whole path; None: it is nothing that may be loaded.
    """
    if base in shipped_configs():
        base = defaults(base).model.base
    try:
        located = locate(base) if base else None
    except UserError:
        return None
    if isinstance(located, str):
        # Runs start in the data folder: an id that begins like a part of it would be a path there.
        return None if located.split("/")[0] in PARTS else located
    if isinstance(located, Path):
        if located.parent == ASSETS:
            return base
        if paths:
            return str(located.resolve())
    return None
