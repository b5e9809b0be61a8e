"""From what a person chose to the settings of a run; what may not be chosen is refused here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nora_diffusion.config import ConfigError, DreamboothConfig, load_config, shipped_configs
from nora_diffusion.families import ASSETS, FAMILIES, PIPELINES
from nora_diffusion.presets import auto_steps
from nora_diffusion.settings import quote
from webui.bases import config_of
from webui.paths import PARTS

_SUBJECT = "it is the subject's; change it in the tab Subject"
_READS = "the app reads nothing outside its own folder"
WITHHELD = {
    "data.subject": "the photos are those of the chosen subject",
    "data.subjects": "a run of the app has one subject",
    "data.class_name": _SUBJECT,
    "data.trigger": _SUBJECT,
    "data.class_images": f"{_READS}; class images are made by the base model",
    "adapter.init_from": _READS,
    "output.dir": "the app keeps each run in its own folder",
    "output.wandb": "the app sends nothing to other machines",
    "output.push_to_hub": "the app sends nothing to other machines",
}
"""Keys that nobody can set through the app, and why: they lead out of the data folder."""

_KEY = re.compile(r"[a-z_]+\.[a-z_]+")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Photos:
    """What a recipe needs to know of a subject: folder, number of photos, and its words."""

    folder: Path
    count: int
    class_name: str
    trigger: str


def make_recipe(
    base: str,
    photos: Photos,
    overrides: Mapping[str, Any],
    preset: str | None,
    run: Path,
    *,
    local_bases: bool,
) -> tuple[str, DreamboothConfig]:
    """The shipped config that was taken, and the settings of the run.

    Args:
        base: name of a shipped config, or a hub id or local path of a base model whose family can
            be told without loading it.
        photos: of the subject.
        overrides: ``section.key`` to value; None, lists and tables as in TOML.
        preset: name of one of ``presets.PRESETS``.
        run: the run folder.
        local_bases: whether a base model may be a path on this machine.

    Raises:
        ConfigError: naming every setting that cannot be used.
    """
    problems: list[str] = []
    config, wanted = _find_base(base, problems)
    tokens: list[str] = [] if wanted is None else [f"model.base={wanted}"]
    for key, value in overrides.items():
        if not _KEY.fullmatch(key):
            problems.append(f"{key[:80]!r}: not a setting; write section.key")
        elif key in WITHHELD:
            problems.append(f"{key} = {quote(value)[:200]}: cannot be set here; {WITHHELD[key]}")
        else:
            tokens.append(f"{key}={spell(value)}")
    tokens += [
        f"data.subject={photos.folder}",
        f"data.class_name={photos.class_name}",
        f"data.trigger={photos.trigger}",
        f"output.dir={run}",
    ]
    found = None
    try:
        found = load_config(shipped_configs()[config], tokens, preset)
    except ConfigError as error:
        problems += error.problems
    if found is not None and found.model.family not in ("auto", *FAMILIES):
        problems.append(
            f'model.family = {quote(found.model.family)[:200]}: use "auto" or one of '
            f"{', '.join(FAMILIES)}"
        )
    if found is not None and not local_bases:
        problems += _refuse_local(found.model.base, run.parent.parent)
    if found is None or problems:
        raise ConfigError(problems, "the settings of this run")
    if found.train.steps == "auto":
        steps = auto_steps(photos.count, pictures_a_step(found))
        train = found.train.model_copy(update={"steps": steps})
        found = found.model_copy(update={"train": train})
    return config, found


def pictures_a_step(config: DreamboothConfig) -> int:
    """Batch size times passes a step."""
    return config.train.batch_size * config.train.gradient_accumulation_steps


def spell(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {quote(part)}" for name, part in value.items()) + " }"
    return "none" if value is None else quote(value)


def _find_base(base: str, problems: list[str]) -> tuple[str, str | None]:
    """Name of the shipped config for a base, and the ``model.base`` to lay over it."""
    shipped = shipped_configs()
    known = config_of(base)
    if known is not None:
        return known, None
    family = _family_of(base)
    config = {"sd": "sd15"}.get(family or "", family)
    if config in shipped:
        return str(config), base
    problems.append(
        f"base = {quote(base[:200])}: cannot tell its family before it is loaded; give one of "
        f"{', '.join(shipped)}, and this as model.base"
    )
    return "mini", None


def _family_of(base: str) -> str | None:
    """Family of a diffusers folder, or of a hub id that is on this machine; None: not known."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index: Any = Path(base).expanduser() / "model_index.json"
        if not index.is_file() and _HUB_ID.fullmatch(base):
            index = try_to_load_from_cache(base, "model_index.json")
        if not isinstance(index, str | Path):
            return None
        family = PIPELINES.get(json.loads(Path(index).read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return family if family in FAMILIES else None


def _refuse_local(base: str, root: Path) -> list[str]:
    """What is wrong with a base where paths are not allowed: only built-in names and hub ids are.

    Runs start in the data folder, so nothing in there can be taken for a hub id either.
    """
    if re.fullmatch(r"[\w-]+", base) and (ASSETS / base / "model_index.json").is_file():
        return []
    hub = _HUB_ID.fullmatch(base) and not base.endswith(".safetensors")
    if hub and base.split("/")[0] not in PARTS and not (root / base).exists():
        return []
    return [
        f"model.base = {quote(base[:200])}: on a server with logins give a built-in base or a "
        "Hugging Face id such as owner/name"
    ]
