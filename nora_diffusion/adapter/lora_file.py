"""LoRA files: the layouts other programs read, and loading them back.

An exported pair is exact and has its scale inside (alpha equals rank). Within a component all pairs
are brought to one rank by zeros, since some programs apply one rank and alpha to all modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import header, original_keys
from .components import (
    activate,
    adaptable_modules,
    adapter_names,
    check_name_is_free,
    components_of,
    inject,
    match_components,
    restored,
    walk,
)
from .header import AdapterFileError, Contents
from .keys import DENOISERS, Dialect, diffusers_name, kohya_name
from .native import parse_header

LAYOUTS = ("diffusers", "kohya", "peft")
_PEFT_PREFIX = "base_model.model."
_TRANSFORMERS = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}

Pairs = dict[str, tuple[Tensor, Tensor]]
"""``(lora_A, lora_B)`` by module name: ``(rank, in)`` and ``(out, rank)``, or 4-D."""


def to_one_rank(pairs: Pairs) -> Pairs:
    """Fill all pairs up with zeros to the largest rank among them, which changes no product."""
    rank = max(lora_A.shape[0] for lora_A, _ in pairs.values())
    filled: Pairs = {}
    for module, (lora_A, lora_B) in pairs.items():
        missing = rank - lora_A.shape[0]
        rows = lora_A.new_zeros(missing, *lora_A.shape[1:])
        columns = lora_B.new_zeros(lora_B.shape[0], missing, *lora_B.shape[2:])
        filled[module] = torch.cat([lora_A, rows]), torch.cat([lora_B, columns], dim=1)
    return filled


def encode(
    components: Mapping[str, Pairs], layout: str, dialect: Dialect, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a LoRA file.

    Raises:
        ValueError: the layout has no name for a module.
    """
    tensors: dict[str, Tensor] = {}
    for component, pairs in components.items():
        for module, (lora_A, lora_B) in pairs.items():
            lora_A, lora_B = lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()
            key, down, up = file_keys(component, module, layout, dialect)
            tensors |= {down: lora_A, up: lora_B}
            if layout == "kohya":
                tensors[f"{key}.alpha"] = torch.tensor(float(lora_A.shape[0]))
    return tensors


def in_layout(
    components: Mapping[str, Pairs],
    models: Mapping[str, nn.Module],
    layout: str,
    dialect: Dialect,
) -> dict[str, Pairs]:
    """Pairs by the layers that a layout names: modules, or layers of a transformer's original code.

    Raises:
        ValueError: the layout has no layer for a module.
    """
    found = dict(components)
    if layout == "kohya" and dialect.transformer:
        for name in found.keys() & set(DENOISERS):
            rows = _out_features(models[name])
            found[name] = original_keys.fuse(found[name], rows, dialect.transformer)
    return found


def file_keys(component: str, module: str, layout: str, dialect: Dialect) -> tuple[str, str, str]:
    """Name of a module in a layout, and of its two tensors: ``lora_A`` and ``lora_B``."""
    if layout == "kohya":
        key = kohya_name(component, module, dialect)
        return key, f"{key}.lora_down.weight", f"{key}.lora_up.weight"
    key = _PEFT_PREFIX + module if layout == "peft" else diffusers_name(component, module)
    return key, f"{key}.lora_A.weight", f"{key}.lora_B.weight"


def dialect_of(components: Mapping[str, nn.Module]) -> Dialect:
    """Kohya naming of the denoiser among the models (SDXL's is told by its extra conditioning)."""
    for model in components.values():
        config: Any = getattr(model, "config", None)
        if transformer := _TRANSFORMERS.get(type(model).__name__):
            return Dialect(transformer=transformer)
        if type(model).__name__ == "UNet2DConditionModel":
            layers = config.layers_per_block
            sdxl = config.addition_embed_type == "text_time"
            return Dialect(sdxl, layers if isinstance(layers, int) else layers[0])
    return Dialect()


def component_name(name: str, model: nn.Module) -> str:
    """Name that other programs give a component; a bare denoiser's comes from its class."""
    kind = type(model).__name__
    if name in DENOISERS or name.startswith("text_encoder"):
        return name
    if kind == "UNet2DConditionModel":
        return "unet"
    if "Transformer" in kind and hasattr(model, "load_lora_adapter"):
        return "transformer"
    if kind.startswith("CLIPTextModel"):
        return "text_encoder"
    raise ValueError(
        f"layouts 'diffusers' and 'kohya' are for the parts of a diffusers pipeline, not for a "
        f"{kind}; use layout='peft'"
    )


def lora_config(model: nn.Module, pairs: Pairs) -> LoraConfig:
    """PEFT configuration under which the pairs are exactly the update."""
    modules = adaptable_modules(model)
    rank = next(iter(pairs.values()))[0].shape[0]
    bases = [_base(modules[name]) for name in pairs if name in modules]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(pairs, modules),
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
        init_lora_weights=False,
    )


def is_export_of(path: Path, checksum: str) -> bool:
    """Whether a file is the LoRA export of the native file with this checksum."""
    try:
        contents = header.read(path)
        fields = parse_header(path, contents.metadata)
    except AdapterFileError:
        return False
    return fields is not None and fields.get("source") == checksum != ""


def load_lora(
    pipe_or_model: Any,
    path: Path,
    contents: Contents,
    fields: dict[str, Any] | None,
    adapter_name: str,
    weight: float,
) -> int:
    """Add a LoRA file as a PEFT LoRA adapter, beside those that are active.

    Returns:
        Number of adapted modules.

    Raises:
        AdapterFileError: the file does not fit; the models are as before.
    """
    targets = components_of(pipe_or_model)
    for name, tensor in contents.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{path}: {name!r} holds NaN or infinite values. Export the adapter again"
            )
    if fields is None:
        return _load_foreign(pipe_or_model, targets, path, contents, adapter_name, weight)
    layout = fields.get("layout")
    if layout not in LAYOUTS:
        raise header.damaged(path, f"unknown layout {layout!r}")
    matched = match_components(cast("dict[str, Any]", fields["components"]), targets, str(path))
    check_name_is_free(matched.values(), adapter_name)
    found = decode(path, contents.tensors, layout, matched, dialect_of(targets))
    with restored(matched.values(), adapter_name) as before:
        for name, model in matched.items():
            _add_lora(path, model, to_one_rank(found[name]), adapter_name)
            activate(model, adapter_name, weight, before[model])
    return sum(len(pairs) for pairs in found.values())


def decode(
    path: Path,
    tensors: dict[str, Tensor],
    layout: str,
    models: Mapping[str, nn.Module],
    dialect: Dialect,
) -> dict[str, Pairs]:
    """Pairs of a file of this project, by component and by module name in the models.

    Raises:
        AdapterFileError: a tensor belongs to no module of the models, or misses its partner.
    """
    left = dict(tensors)
    found: dict[str, Pairs] = {name: {} for name in models}
    for name, model in models.items():
        try:
            label = name if layout == "peft" else component_name(name, model)
        except ValueError as error:
            raise AdapterFileError(f"{path}: cannot be loaded here: {error}") from error
        rows = _out_features(model)
        for (key, down, up), parts in _layers(label, model, layout, dialect).items():
            if down in left and up in left:
                pair = left.pop(down), left.pop(up)
                left.pop(f"{key}.alpha", None)
                if len(parts) > 1:
                    found[name] |= original_keys.split(pair, parts, rows)
                else:
                    found[name][parts[0]] = pair
    if left:
        raise AdapterFileError(
            f"{path}: {len(left)} of its {len(tensors)} tensors belong to no module of this model, "
            f"e.g. {next(iter(left))}. Load it on the kind of base model it was trained on"
        )
    if empty := [name for name, pairs in found.items() if not pairs]:
        raise AdapterFileError(f"{path}: holds nothing for {empty[0]}. Export the adapter again")
    return found


def _layers(
    component: str, model: nn.Module, layout: str, dialect: Dialect
) -> dict[tuple[str, str, str], Sequence[str]]:
    """Modules of a model by the names under which a layout has them in a file."""
    fused = layout == "kohya" and dialect.transformer and component in DENOISERS
    found: dict[tuple[str, str, str], Sequence[str]] = {}
    for module in adaptable_modules(model):
        try:
            layer, parts = module, (module,)
            if fused:
                layer, parts = original_keys.original_layer(module, dialect.transformer)
            found[file_keys(component, layer, layout, dialect)] = parts
        except ValueError:  # the layout has no name for it, so no file has it
            continue
    return found


def _add_lora(path: Path, model: nn.Module, pairs: Pairs, adapter_name: str) -> None:
    config = lora_config(model, pairs)
    inject(model, config, adapter_name, (f"{module}.lora_A.weight" for module in pairs))
    layers = dict(walk(model))
    for module, tensors in pairs.items():
        layer = layers.get(module)
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            raise AdapterFileError(
                f"{path}: {module} cannot take a LoRA here (it is a {type(layer).__name__}); "
                "remove adapters of other kinds from it first"
            )
        for store, tensor in zip((layer.lora_A, layer.lora_B), tensors, strict=True):
            weight = cast(Tensor, store[adapter_name].weight)
            if weight.shape != tensor.shape:
                raise AdapterFileError(
                    f"{path}: {module} needs a tensor {tuple(weight.shape)} here, the file has "
                    f"{tuple(tensor.shape)}. Load it on the base model it was trained on"
                )
            weight.data.copy_(tensor)


def _load_foreign(
    pipe: Any,
    targets: dict[str, nn.Module],
    path: Path,
    contents: Contents,
    adapter_name: str,
    weight: float,
) -> int:
    """Another program's file: diffusers knows its layouts, the count tells whether it took it."""
    downs = [k for k in contents.tensors if re.search(r"(lora_A|lora_down|lora\.down)\b", k)]
    if any("nora_" in key for key in contents.tensors):
        raise AdapterFileError(
            f"{path}: NoRA tensors without this project's header: a PEFT folder. Load it with "
            "PeftModel.from_pretrained after `import nora_diffusion.adapter`"
        )
    if not downs or not hasattr(pipe, "load_lora_weights"):
        raise AdapterFileError(
            f"{path}: neither a native adapter nor a LoRA file that can be loaded into a "
            f"{type(pipe).__name__}; LoRA files of other programs are loaded into pipelines only"
        )
    check_name_is_free(targets.values(), adapter_name)
    with restored(targets.values(), adapter_name) as before:
        try:
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=adapter_name
            )
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            raise AdapterFileError(f"{path}: diffusers refuses this file: {error}") from error
        count = sum(
            isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
            for model in targets.values()
            for layer in model.modules()
        )
        if count < len(downs):
            raise AdapterFileError(
                f"{path}: only {count} of its {len(downs)} modules are in this pipeline. Load it "
                "on the kind of base model it was trained on"
            )
        for model in targets.values():
            if adapter_name in adapter_names(model):
                activate(model, adapter_name, weight, before[model])
    return count


def _target_modules(names: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Names if PEFT's matching by endings takes them alone, else an exact regular expression."""
    names = set(names)
    endings = tuple(f".{name}" for name in names)
    if {m for m in modules if m in names or m.endswith(endings)} == names:
        return sorted(names)
    return f"(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def _out_features(model: nn.Module) -> dict[str, int]:
    bases = {name: _base(module) for name, module in adaptable_modules(model).items()}
    return {
        name: cast(int, base.out_features)
        for name, base in bases.items()
        if hasattr(base, "out_features")
    }


def _base(module: nn.Module) -> nn.Module:
    get_base_layer = getattr(module, "get_base_layer", None)
    return cast(nn.Module, get_base_layer()) if callable(get_base_layer) else module
