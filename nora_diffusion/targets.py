"""``nora targets``: what an adapter would train in a model, from the model's config alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft.mapping import inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel

from nora_diffusion.adapter import NoraConfig, deferred_factors, iter_nora_layers
from nora_diffusion.adapter.components import ignore_lowered_ranks, plain_name, restored
from nora_diffusion.adapter.targets import ATTENTION, linear_layers_told
from nora_diffusion.config import RUN_CONFIG, DreamboothConfig, UserError
from nora_diffusion.families import ASSETS, locate
from nora_diffusion.families.base import Family
from nora_diffusion.families.quiet import quiet_loading
from nora_diffusion.families.skeleton import META, config_folder, skeleton
from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.run_config import shipped_configs, shipped_recipes
from nora_diffusion.settings import check_expression, quote, read_toml
from nora_diffusion.vision_language_config import VisionLanguageConfig

LORA_RANK = 16
"""Of the LoRA whose size stands beside."""

SHAPES = ("smollm2_135m", "llama3_8b", "llama3_70b", "gpt3_175b", "moe_1t")
"""Language models whose configs come with this package: `assets/shapes/README.md`."""

_ADAPTER = "targets"
_KEYWORDS = (ATTENTION, "all-linear")
_ALLOWED = (
    'the name of a shipped config such as "mini", "sd15" or "llm", one of mini_clip, '
    f"{', '.join(SHAPES)}, "
    "a Hugging Face id, a diffusers folder or .safetensors file, a transformers folder or its "
    "config.json, or a .gguf file"
)

Targets = str | list[str]


@dataclass(frozen=True)
class Choice:
    """One set of modules in one model.

    Attributes:
        name: what the choice is called.
        model: the model, on the meta device.
        targets: its modules, as ``NoraConfig.target_modules``.
        required: the user asked for this very choice, so that finding nothing is an error.
        family: what the model is part of, where it is a part of a diffusion model.
    """

    name: str
    model: nn.Module
    targets: Targets
    required: bool = False
    family: Family | None = None


@dataclass(frozen=True)
class Target:
    """One module that would be adapted.

    Attributes:
        name: its name.
        shape: rows and columns of its weight, a kernel unfolded to ``(out, in * kh * kw)``.
        nora: numbers that NoRA trains in it.
        lora: numbers that a LoRA of rank ``LORA_RANK`` trains in it.
    """

    name: str
    shape: tuple[int, int]
    nora: int
    lora: int


def lines(
    source: str, given: Sequence[str] = (), r: int = 64, inner_r: int = 8, modules: bool = False
) -> Iterator[str]:
    """Describe what an adapter would train, without loading weights.

    Args:
        source: the model, as the user names it.
        given: "attention", "all-linear", names or their endings, or one regular expression; none:
            all that this project or its settings have names for.
        r: outer rank.
        inner_r: inner rank.
        modules: name every module.

    Raises:
        UserError: there is no such model, nothing in it fits ``given``, or the ranks cannot be.
    """
    check_ranks(r, inner_r)
    for choice in choices_of(source, parse_targets(given)):
        found = find_targets(choice, r, inner_r)
        if not found:
            yield f"{choice.name}: no modules"
            continue
        nora, lora = sum(t.nora for t in found), sum(t.lora for t in found)
        yield (
            f"{choice.name}: {len(found)} modules{told_narrow(found, r)}, "
            f"NoRA r {r} inner r {inner_r} trains {nora:,}, LoRA r {LORA_RANK} {lora:,}"
        )
        kinds: dict[str, list[Target]] = {}
        for target in found:
            kinds.setdefault(_ending(target.name), []).append(target)
        width = max(map(len, kinds))
        for ending, members in kinds.items():
            shapes = dict.fromkeys("{} x {}".format(*target.shape) for target in members)
            yield f"  {len(members):4}  {ending:{width}}  {', '.join(shapes)}"
            if modules:
                yield from (f"        {target.name}" for target in members)


def choices_of(
    source: str, given: Targets | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[Choice]:
    """What can be adapted in a model of a number format, or what is ``given`` in its main part.

    Raises:
        UserError: there is no such model.
    """
    folder = _transformers_source(source)
    if folder is not None:
        model = _empty_model(folder, source).to(dtype)
        for targets in _KEYWORDS if given is None else (given,):
            yield Choice(_told(targets), model, targets, required=given is not None)
        return
    with quiet_loading():
        family: Family = skeleton(_base_of(source), dtype)
    parts = family.components
    if given is not None:
        told = f"{parts.denoiser_name}, {_told(given)}"
        yield Choice(told, parts.denoiser, given, required=True, family=family)
        return
    for name, endings in family.targets.items():
        yield Choice(f"{parts.denoiser_name}, {name}", parts.denoiser, list(endings))
    for name, encoder in parts.text_encoders.items():
        yield Choice(name, encoder, list(family.text_targets))


def check_ranks(r: int, inner_r: int) -> None:
    """Refuse an inner rank that the outer one cannot hold.

    Raises:
        UserError: naming both options.
    """
    if inner_r > r:
        raise UserError(
            f"--inner-r {inner_r}: must be at most --r {r}, the outer rank that it lies in; "
            "raise --r or lower --inner-r"
        )


def told_narrow(found: Sequence[Target], r: int) -> str:
    """How many modules cannot have rank r, where the numbers are those of a lower one; or ""."""
    narrow = [target.name for target in found if min(target.shape) < r]
    return f" ({len(narrow)} of them narrower than r, e.g. {narrow[0]})" if narrow else ""


def find_targets(choice: Choice, r: int, inner_r: int) -> list[Target]:
    """The modules of a choice: an adapter is put on the empty model, read, and taken off again.

    Raises:
        UserError: nothing fits a choice that the user named, or NoRA cannot adapt what does.
    """
    if not choice.targets:
        return []
    config = NoraConfig(r=r, inner_r=inner_r, target_modules=choice.targets)
    with warnings.catch_warnings(), restored([choice.model], _ADAPTER, always=True):
        ignore_lowered_ranks()
        try:
            with deferred_factors():
                inject_adapter_in_model(config, choice.model, _ADAPTER)
        except (ValueError, TypeError) as error:
            nothing = "arget modules" in str(error)
            if nothing and not choice.required:
                return []
            told = str(error)
            if nothing and choice.targets != ATTENTION:  # whose error says all of this
                model = type(choice.model).__name__
                told = (
                    f"{_told(choice.targets)}: no such module in this {model}. "
                    f"{linear_layers_told(choice.model)} Name those to adapt, or their endings; or "
                    f"give {' or '.join(_KEYWORDS)}"
                )
            raise UserError(f"--targets: {told}") from error
        found = [
            Target(
                name=plain_name(name),
                shape=(layer.out_features, layer.in_features),
                nora=layer.nora_inner_A[_ADAPTER].numel() + layer.nora_inner_B[_ADAPTER].numel(),
                lora=LORA_RANK * (layer.out_features + layer.in_features),
            )
            for name, layer in iter_nora_layers(choice.model)
        ]
    if choice.required and isinstance(choice.targets, list):
        _warn_of_idle(choice.targets, [target.name for target in found])
    return found


def _warn_of_idle(endings: Sequence[str], found: Sequence[str]) -> None:
    """Name what fits no module, where other endings do: PEFT passes over it in silence."""
    idle = [e for e in endings if not any(f".{name}".endswith(f".{e}") for name in found)]
    if idle:
        warnings.warn(
            f"--targets {' '.join(idle)}: no module has this name or ending, so nothing is adapted "
            "for it (nora targets MODEL --modules lists names)",
            stacklevel=3,
        )


def parse_targets(given: Sequence[str]) -> Targets | None:
    """`target_modules` from the command line; one value is an expression if no name looks so.

    Raises:
        UserError: when it is none.
    """
    if not given:
        return None
    only = given[0] if len(given) == 1 else ""
    if only in _KEYWORDS:
        return only
    if only and not re.fullmatch(r"[\w.]+", only):
        cure = f"{', '.join(_KEYWORDS)}, names or endings of modules, or one expression as of "
        check_expression(f"--targets {quote(only)}", only, cure + "Python's re")
        return only
    return list(given)


def _told(targets: Targets) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _base_of(source: str) -> str:
    """A base, or that of a shipped config or recipe of this name, whatever command it is for."""
    for schema in (DreamboothConfig, LanguageConfig, VisionLanguageConfig):
        command = schema.command
        file = (shipped_configs(command) | shipped_recipes(command)).get(source)
        if file is not None:
            return str(read_toml(file).get("model", {}).get("base", source))
    return source


def _transformers_source(source: str) -> Path | None:
    """Folder or file of a transformers model; None for a base of one of the families.

    Raises:
        UserError: neither of the two is there, or it is a run folder.
    """
    base = _base_of(source)
    shape = "smollm2_135m" if base == "smollm2" else base  # its name in model.base
    if shape in SHAPES:
        return ASSETS / "shapes" / shape
    if base == "mini_clip":
        return ASSETS / base
    path = Path(source).expanduser()
    if (path / RUN_CONFIG).is_file():
        base = read_toml(path / RUN_CONFIG).get("model", {}).get("base")
        cure = f"its base, {base}" if base else "the base it was trained on"
        raise UserError(f'MODEL = "{source}": is the folder of a run; give {cure}')
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir() and not (path / "model_index.json").is_file():
        return path
    try:
        located = locate(base)
    except UserError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise UserError(f'MODEL = "{source}": {reason}; give {_ALLOWED}') from error
    if isinstance(located, Path):
        return None
    folder = config_folder(base)
    return None if (folder / "model_index.json").is_file() else folder


def _empty_model(path: Path, source: str) -> nn.Module:
    """A transformers model on the meta device, of the class that its config names.

    Raises:
        UserError: transformers cannot read its config.
    """
    folder, which = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **which)
    except (ValueError, OSError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f'MODEL = "{source}": transformers cannot read its config ({first}); give {_ALLOWED}'
        ) from error
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    kind = next((found for found in named if found is not None), None)
    with META, quiet_loading():
        return AutoModel.from_config(config) if kind is None else kind(config)


def _ending(name: str) -> str:
    """The end of a module's name that says what it is: `attn1.to_q`, `to_out.0`, `layers.N.fc1`."""
    parts = name.split(".")
    length = min(2, len(parts))
    while parts[-length].isdigit() and length < len(parts):
        length += 1
    *path, last = parts[-length:]
    return ".".join([*("N" if part.isdigit() else part for part in path), last])
