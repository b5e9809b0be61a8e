"""Exact export of an adapter as a LoRA, in the layouts that other programs load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from nora_diffusion.disk import write_atomically

from . import header, lora_file
from .components import components_of, match_components, restored
from .header import AdapterFileError
from .keys import Dialect
from .loading import (
    FILE_NAMES,
    LORA_FILE,
    PEFT_WEIGHTS,
    OtherBaseError,
    add_native,
    find_files,
    open_base,
)
from .lora_file import LAYOUTS, Pairs
from .native import (
    NativeAdapter,
    config_to_json,
    header_metadata,
    parse_header,
    parse_native,
)

__all__ = ["LAYOUTS", "export_lora"]

PEFT_CONFIG = "adapter_config.json"
_ADAPTER_NAME = "nora_export"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Class of the transformer to its names in modelspec and in kohya's metadata. The programs that have
# names for the last four do not agree on them; these are the plain ones.
_TRANSFORMERS = {
    "FluxTransformer2DModel": ("flux-1", "flux1"),
    "SD3Transformer2DModel": ("stable-diffusion-3", "sd3"),
    "Flux2Transformer2DModel": ("flux-2-klein", "flux2_klein"),
    "ZImageTransformer2DModel": ("z-image", "z_image"),
    "PixArtTransformer2DModel": ("pixart-sigma", "pixart_sigma"),
    "SanaTransformer2DModel": ("sana", "sana"),
}
_FULL_RANK = "trained with timestep_rank; the export is taken at the full inner rank"


def export_lora(
    path: str | Path,
    out: str | Path,
    layout: str = "diffusers",
    base: Any = "mini",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter as an exact LoRA (method, "Exact export to LoRA").

    The LoRA has rank ``inner_r`` where the initial product is zero and ``2 inner_r`` otherwise; it
    is not truncated or fitted. Its scale is inside: alpha equals the rank.

    Args:
        path: native file, or a folder with one.
        out: file to write. For layout "peft" the folder of the PEFT adapter (with one subfolder a
            component if there are several), or its file `adapter_model.safetensors`.
        layout: "diffusers" (`pipe.load_lora_weights`), "kohya" (A1111, Forge, ComfyUI,
            sd-scripts; SD 1.x, 2.x, SDXL, SD 3 and Flux.1) or "peft" (`PeftModel.from_pretrained`).
        base: the base model it was trained on: a loaded pipeline or model (left as it is), or what
            `load_pipeline` takes.
        dtype: dtype of the file; None keeps the one of the inner pair.

    Returns:
        `out`.

    Raises:
        ValueError: an unknown layout or dtype, a layout without names for this model, or an `out`
            that would overwrite the adapter itself, is a folder where a file is written, or a file
            whose name does not end in `.safetensors`.
        AdapterFileError: the file is damaged, or does not fit the base.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: use one of {', '.join(LAYOUTS)}")
    header.check_dtype(dtype)
    path, out = find_files(Path(path))[0], Path(out).expanduser()
    contents = header.read(path)
    fields = parse_header(path, contents.metadata)
    if fields is None or fields["kind"] != "native":
        raise AdapterFileError(_not_native(path, fields))
    adapter = parse_native(path, contents, fields)
    _check_exportable(path, adapter)
    _check_out(path, out, layout, list(adapter.components))
    base = open_base(base, adapter)
    targets = components_of(base)
    matched = match_components(adapter.components, targets, str(path))
    pairs = _exact_pairs(path, adapter, targets, matched)
    if dtype is None:
        dtype = next(iter(contents.tensors.values())).dtype
    entries = _component_entries(adapter, pairs)
    common = {**adapter.about, "kind": "lora", "layout": layout, "source": adapter.checksum}
    if any(component.config.timestep_rank is not None for component in adapter.components.values()):
        common["note"] = _FULL_RANK
        warnings.warn(f"{path}: {_FULL_RANK}", stacklevel=2)
    dialect = lora_file.dialect_of(targets)
    architecture = _architecture(base, dialect)
    if layout == "peft":
        return _write_peft(out, pairs, matched, entries, common, architecture, dtype)
    named = {lora_file.component_name(name, matched[name]): pairs[name] for name in pairs}
    fields = {**common, "components": dict(zip(named, entries.values(), strict=True))}
    models = {lora_file.component_name(name, model): model for name, model in matched.items()}
    named = lora_file.in_layout(named, models, layout, dialect)
    tensors = lora_file.encode(named, layout, dialect, dtype)
    metadata = header_metadata(fields) | _shared_metadata(out, named, fields, architecture)
    return header.write(out, tensors, metadata)


def _check_exportable(path: Path, adapter: NativeAdapter) -> None:
    for name, component in adapter.components.items():
        if component.saved:
            raise AdapterFileError(
                f"{path}: {name} has fully trained modules ({', '.join(component.saved)}), which a "
                "LoRA file cannot hold; use the native file, or train without modules_to_save"
            )


def _not_native(path: Path, fields: dict[str, Any] | None) -> str:
    if fields is None:
        return f"{path}: was not written by nora-diffusion; give an {FILE_NAMES[0]} of it"
    run = path.with_name(FILE_NAMES[0])
    cure = f"give that, {run}" if run.is_file() else f"give that, the {run.name} of its run"
    return f"{path}: is a LoRA already, exported from a native adapter; {cure}"


def _check_out(path: Path, out: Path, layout: str, names: Sequence[str]) -> None:
    files = peft_files(out, names).values() if layout == "peft" else [out]
    for file in files:
        if file.is_dir():
            raise ValueError(
                f"{file}: is a folder; give a file name, as in {file / 'lora'}.safetensors"
            )
        if file.exists() and file.samefile(path):
            raise ValueError(
                f"{file}: is the adapter itself, which the export would overwrite; give another "
                "file name" + (", or a folder of its own" if layout == "peft" else "")
            )
        if file.suffix.lower() != ".safetensors":  # programs tell by it how to read a file
            stem = file.with_suffix("") if file.suffix in _PICKLES else file
            raise ValueError(
                f"{file}: layout {layout!r} is a safetensors file, whose name must end in "
                f".safetensors; give {stem}.safetensors"
            )


def peft_files(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """The weight files of layout "peft" by component: `out` itself, in it, or in subfolders."""
    if out.suffix == ".safetensors":
        return dict.fromkeys(names, out)
    return {name: (out if len(names) == 1 else out / name) / PEFT_WEIGHTS for name in names}


def _exact_pairs(
    path: Path,
    adapter: NativeAdapter,
    targets: dict[str, nn.Module],
    matched: dict[str, nn.Module],
) -> dict[str, Pairs]:
    try:
        with restored(matched.values(), _ADAPTER_NAME, always=True):
            layers = add_native(path, adapter, targets, _ADAPTER_NAME)
            pairs = {
                name: {module: layer.lora_factors(_ADAPTER_NAME) for module, layer in found.items()}
                for name, found in layers.items()
            }
    except OtherBaseError:
        # Another export of the same adapter has the same numbers.
        beside = path.with_name(LORA_FILE)
        if not lora_file.is_export_of(beside, adapter.checksum):
            raise
        contents = header.read(beside)
        fields = cast("dict[str, Any]", parse_header(beside, contents.metadata))
        layout, dialect = str(fields["layout"]), lora_file.dialect_of(targets)
        pairs = lora_file.decode(beside, contents.tensors, layout, matched, dialect)
    return {name: lora_file.to_one_rank(found) for name, found in pairs.items()}


def _component_entries(
    adapter: NativeAdapter, pairs: Mapping[str, Pairs]
) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "config": config_to_json(component.config),
            "base_dtype": component.base_dtype,
            "modules": len(pairs[name]),
            "rank": next(iter(pairs[name].values()))[0].shape[0],
            "parameters": sum(a.numel() + b.numel() for a, b in pairs[name].values()),
        }
        for name, component in adapter.components.items()
    }


def _write_peft(
    out: Path,
    pairs: Mapping[str, Pairs],
    models: Mapping[str, nn.Module],
    entries: Mapping[str, dict[str, Any]],
    common: dict[str, Any],
    architecture: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    if out.suffix == ".safetensors" and len(pairs) > 1:
        raise ValueError(
            f"{out}: layout 'peft' has one adapter a model, and this file adapts "
            f"{', '.join(pairs)}; give a folder"
        )
    for name, file in peft_files(out, list(pairs)).items():
        found = pairs[name]
        tensors = lora_file.encode({name: found}, "peft", Dialect(), dtype)
        fields = {**common, "components": {name: entries[name]}}
        shared = _shared_metadata(out, {name: found}, fields, architecture)
        header.write(file, tensors, shared | header_metadata(fields))
        config = cast("dict[str, Any]", lora_file.lora_config(models[name], found).to_dict())
        text = json.dumps(config, default=sorted, indent=2, sort_keys=True)
        write_atomically(file.with_name(PEFT_CONFIG), text.encode())
    return out


def _shared_metadata(
    out: Path,
    pairs: Mapping[str, Pairs],
    fields: Mapping[str, Any],
    architecture: Mapping[str, str],
) -> dict[str, str]:
    """What A1111, ComfyUI and model sites read of a LoRA file (modelspec and kohya's ss_ keys)."""
    ranks = {lora_A.shape[0] for found in pairs.values() for lora_A, _ in found.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    values: dict[str, Any] = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": out.stem,
        "modelspec.description": fields.get("note"),
        "modelspec.trigger_phrase": fields.get("trigger"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": out.stem,
        "ss_sd_model_name": fields.get("base"),
        "ss_steps": fields.get("steps"),
        "ss_training_comment": fields.get("note"),
        **architecture,
    }
    if trigger := fields.get("trigger"):
        # A1111 offers the most frequent tags as the words to prompt with.
        words = " ".join(filter(None, [str(trigger), fields.get("class_name")]))
        values["ss_tag_frequency"] = json.dumps({out.stem: {words: 1}})
    return {key: str(value) for key, value in values.items() if value is not None}


def _architecture(base: Any, dialect: Dialect) -> dict[str, str]:
    """Names of the base's architecture, where it is one that has names."""

    def part(name: str) -> Any:
        return base if isinstance(base, nn.Module) else getattr(base, name, None)

    scheduler = getattr(getattr(base, "scheduler", None), "config", None)
    prediction = getattr(scheduler, "prediction_type", None)
    width = getattr(getattr(part("unet"), "config", None), "cross_attention_dim", None)
    architecture, more = "", {}
    if names := _TRANSFORMERS.get(type(part("transformer")).__name__):
        architecture, more["ss_base_model_version"] = names
        architecture += _variant(architecture, part("transformer").config)
    elif dialect.sdxl:
        architecture = "stable-diffusion-xl-v1-base"
        more["ss_base_model_version"] = "sdxl_base_v1-0"
    elif width == 768:
        architecture = "stable-diffusion-v1"
        more = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    elif width == 1024:
        kind = "768-v" if prediction == "v_prediction" else "512"
        architecture = f"stable-diffusion-v2-{kind}"
        more = {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
    names = {"v_prediction": "v", "epsilon": "epsilon"}
    if prediction in names:
        more["modelspec.prediction_type"] = names[prediction]
    return more | ({"modelspec.architecture": f"{architecture}/lora"} if architecture else {})


def _variant(architecture: str, config: Any) -> str:
    if architecture == "flux-1":
        return "-dev" if config.guidance_embeds else "-schnell"
    if architecture == "stable-diffusion-3":
        if config.qk_norm is None:
            return "-m"
        return "-5-large" if config.num_layers > 24 else "-5-medium"
    return ""
