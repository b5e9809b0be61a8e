"""Saving and loading adapters: one file for every model of a pipeline.

The native formats are in `native`, the LoRA ones in `lora_file`; both are described in
`docs/formats.md`. Loading changes the models completely or not at all.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch

from nora_diffusion import __version__

from . import header
from .components import (
    activate,
    adapter_names,
    check_arguments,
    check_name_is_free,
    components_of,
    match_components,
    restored,
)
from .header import AdapterFileError
from .keys import DENOISERS
from .loading import (
    LORA_FILE,
    OtherBaseError,
    add_native,
    find_files,
    fingerprints_of,
    inject_layers,
    nora_layers,
    open_base,
)
from .lora_file import is_export_of, load_lora
from .native import (
    FORMAT_VERSION,
    Component,
    NativeAdapter,
    config_from_json,
    config_to_json,
    parse_header,
    parse_native,
    write_native,
)
from .saving import collect, needs_portable

__all__ = [
    "FORMAT_VERSION",
    "AdapterFileError",
    "adapter_info",
    "load_adapter",
    "save_adapter",
]

#: What `metadata` may say of an adapter's origin and `adapter_info` always lists.
ABOUT = ("base", "family", "trigger", "class_name", "steps")


def save_adapter(
    pipe_or_model: Any,
    path: str | Path,
    adapter_name: str = "default",
    portable: bool = False,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a NoRA adapter, on all models of a pipeline that have it, into one native file.

    A compact file holds the inner pairs alone, ``2 * r * inner_r`` numbers a module; the outer
    pairs are derived from the base weights again, whose fingerprints are recorded. A portable file
    holds both. Where the outer pairs cannot be derived again (quantised base, `basis` fitted to
    data) the file is always portable.

    Args:
        pipe_or_model: a diffusers pipeline, or one model.
        path: the `.safetensors` file; replaced in one step if it exists.
        adapter_name: which adapter.
        portable: carry the outer pairs.
        dtype: dtype of the stored tensors; None keeps what they have (float32 after training).
        metadata: what to record of its origin, JSON values by name: `base`, `base_hash`, `family`,
            `trigger`, `class_name`, `steps`, `training` (a summary), or anything else.

    Returns:
        The path.

    Raises:
        ValueError: no such adapter, or one that a file of this kind cannot hold.
    """
    header.check_dtype(dtype)
    targets = components_of(pipe_or_model)
    layers = {name: nora_layers(model, adapter_name) for name, model in targets.items()}
    layers = {name: found for name, found in layers.items() if found}
    if not layers:
        names = sorted({name for model in targets.values() for name in adapter_names(model)})
        raise ValueError(
            f"no NoRA adapter is called {adapter_name!r}; adapters here: "
            f"{', '.join(names) or 'none'}"
        )
    every = [layer for found in layers.values() for layer in found.values()]
    portable = portable or any(needs_portable(layer, adapter_name) for layer in every)
    components = {
        name: collect(name, targets[name], found, adapter_name, portable, dtype)
        for name, found in layers.items()
    }
    about = {"base": _base_name(pipe_or_model), **(metadata or {})}
    about["versions"] = {
        "nora_diffusion": __version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__),
    }
    path = Path(path)
    write_native(path, NativeAdapter(components, portable, about))
    return path


def load_adapter(
    pipe_or_model: Any, path: str | Path, adapter_name: str = "default", weight: float = 1.0
) -> int:
    """Add an adapter from a native or LoRA file; it is active beside those that already are.

    Afterwards it is an adapter like any other of PEFT: `pipe.set_adapters`, `fuse_lora`,
    `delete_adapters` and so on work. Adapters switched off by `disable_lora` and its like are
    switched on again. A load that fails leaves the models as they were.

    Where a compact file meets base weights in another dtype than those it was trained on, the outer
    pairs come from the cache on this machine; else the LoRA export
    `pytorch_lora_weights.safetensors` beside the file is loaded in its place; else the file is
    refused, as it is on another base in the same dtype.

    Args:
        pipe_or_model: a diffusers pipeline, or one model.
        path: the file, a folder with one, or an export in the layout "peft" with a sub-folder for
            each model.
        adapter_name: a name that is not in use, without dots.
        weight: scale of the adapter's effect.

    Returns:
        Number of adapted modules.

    Raises:
        AdapterFileError: the file is damaged or does not fit; the message says what to do.
        ValueError: the name is in use or cannot be one, or the weight is not finite.
        TypeError: the name is no text, or the weight no number.
    """
    check_arguments(adapter_name, weight)
    path, *others = find_files(Path(path))
    if others:
        return _load_parts(pipe_or_model, [path, *others], adapter_name, weight)
    contents = header.read(path)
    fields = parse_header(path, contents.metadata)
    if fields is None or fields["kind"] == "lora":
        return load_lora(pipe_or_model, path, contents, fields, adapter_name, weight)
    adapter = parse_native(path, contents, fields)
    targets = components_of(pipe_or_model)
    models = list(match_components(adapter.components, targets, str(path)).values())
    check_name_is_free(models, adapter_name)
    try:
        with restored(models, adapter_name) as before:
            layers = add_native(path, adapter, targets, adapter_name)
            for model in models:
                activate(model, adapter_name, weight, before[model])
    except OtherBaseError as error:
        beside = path.with_name(LORA_FILE)
        if not is_export_of(beside, adapter.checksum):
            raise
        if error.trained == error.present:  # not rounded: another model
            message = f"{error}; or load {beside.name} beside it by hand, onto whatever base"
            raise OtherBaseError(message, error.trained, error.present) from None
        warnings.warn(
            f"{path}: was trained on weights in {error.trained}, and these are in "
            f"{error.present}, so its exact LoRA export {beside.name} is loaded in its place",
            stacklevel=2,
        )
        contents = header.read(beside)
        fields = parse_header(beside, contents.metadata)
        try:
            return load_lora(pipe_or_model, beside, contents, fields, adapter_name, weight)
        except AdapterFileError as second:
            raise error from second
    return sum(len(found) for found in layers.values())


def _load_parts(pipe_or_model: Any, files: Sequence[Path], adapter_name: str, weight: float) -> int:
    """Load the sub-folders of a PEFT export, all or none.

    Raises:
        AdapterFileError: one of them is damaged, does not fit, or is of another adapter.
    """
    folder, targets = files[0].parent.parent, components_of(pipe_or_model)
    parts = {file: header.read(file) for file in files}
    fields = {file: parse_header(file, contents.metadata) for file, contents in parts.items()}
    _check_one_adapter(folder, fields)
    names = [name for found in fields.values() for name in (found or {})["components"]]
    models = list(match_components(names, targets, str(folder)).values())
    check_name_is_free(models, adapter_name)
    with restored(models, adapter_name):
        return sum(
            load_lora(pipe_or_model, file, contents, fields[file], adapter_name, weight)
            for file, contents in parts.items()
        )


def _check_one_adapter(folder: Path, fields: Mapping[Path, dict[str, Any] | None]) -> None:
    sources = {None if found is None else found.get("source") for found in fields.values()}
    if len(sources) > 1 or None in sources:
        names = ", ".join(file.parent.name for file in fields)
        raise AdapterFileError(
            f"{folder}: its sub-folders {names} are not parts of one export of this project; give "
            "one of them, or export the adapter again into an empty folder"
        )


def adapter_info(path: str | Path, base: Any = None) -> dict[str, Any]:
    """Describe an adapter file.

    Args:
        path: native or exported LoRA file, or a folder as of `load_adapter`.
        base: base model to compare the recorded fingerprints with: a pipeline, a model, or what
            `load_pipeline` takes.

    Returns:
        `format_version`, `kind` ("native" or "lora"), `portable`, `config` (of the denoiser, or of
        the only model), `base`, `family`, `trigger`, `class_name`, `steps`,
        `modules` (how many), `trainable_parameters` (numbers in the inner pairs; of a LoRA file
        the numbers in the LoRA, which are more), `checksum` (of the content), `bytes`,
        `fingerprints_ok` (None without `base` or for a LoRA file), `components` (the same per
        component) and `metadata` (all that was recorded at saving).

    Raises:
        AdapterFileError: the file is damaged, or was not written by this project.
    """
    files = find_files(Path(path))
    found = [_info_of(file, base) for file in files]
    if len(found) == 1:
        return found[0]
    fields = {file: one["metadata"] for file, one in zip(files, found, strict=True)}
    _check_one_adapter(files[0].parent.parent, fields)
    parts = {name: part for one in found for name, part in one["components"].items()}
    main = parts[_main(parts)]
    checksums = "".join(one["checksum"] for one in found)
    sums = {
        key: sum(one[key] for one in found) for key in ("modules", "trainable_parameters", "bytes")
    }
    return (
        found[0]
        | sums
        | {
            "config": main["config"],
            "checksum": hashlib.sha256(checksums.encode()).hexdigest(),
            "components": parts,
        }
    )


def _main(components: Mapping[str, Any]) -> str:
    """The denoiser's name, or the first of the components."""
    return next((name for name in DENOISERS if name in components), next(iter(components)))


def _info_of(path: Path, base: Any) -> dict[str, Any]:
    contents = header.read(path)
    fields = parse_header(path, contents.metadata)
    if fields is None:
        raise AdapterFileError(
            f"{path}: was not written by nora-diffusion, so it says nothing of itself; "
            "load_adapter still loads a LoRA file of another program into a pipeline"
        )
    about = {k: v for k, v in fields.items() if k not in ("kind", "portable", "components")}
    info: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": fields["kind"]}
    ok = None
    if info["kind"] == "native":
        adapter = parse_native(path, contents, fields)
        info["portable"] = adapter.portable
        parts = {name: _describe(component) for name, component in adapter.components.items()}
        ok = None if base is None else _fingerprints_ok(path, adapter, base)
    else:
        info["portable"] = True
        parts = _describe_lora(path, fields)
    info["config"] = parts[_main(parts)]["config"]
    info |= {key: about.get(key) for key in ABOUT}
    for key in ("modules", "trainable_parameters"):
        info[key] = sum(part[key] for part in parts.values())
    return info | {
        "checksum": contents.metadata[header.CHECKSUM_KEY],
        "bytes": path.stat().st_size,
        "fingerprints_ok": ok,
        "components": parts,
        "metadata": about,
    }


def _base_name(pipe_or_model: Any) -> str | None:
    config = getattr(pipe_or_model, "config", None)
    name = getattr(config, "_name_or_path", None)
    return str(name) if name else None


def _describe(component: Component) -> dict[str, Any]:
    pairs = component.modules.values()
    numbers = sum(pair.inner_A.numel() + pair.inner_B.numel() for pair in pairs)
    numbers += sum(p.numel() for saved in component.saved.values() for p in saved.values())
    return {
        "config": config_to_json(component.config),
        "modules": len(component.modules),
        "trainable_parameters": numbers,
        "base_dtype": component.base_dtype,
    }


def _describe_lora(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "config": config_to_json(config_from_json(path, entry.get("config"))),
            "modules": entry.get("modules"),
            "trainable_parameters": entry.get("parameters"),
            "base_dtype": entry.get("base_dtype"),
        }
        for name, entry in cast("dict[str, dict[str, Any]]", fields["components"]).items()
    }


def _fingerprints_ok(path: Path, adapter: NativeAdapter, base: Any) -> bool:
    name = "nora_fingerprint_check"
    targets = components_of(open_base(base, adapter))
    try:
        matched = match_components(adapter.components, targets, str(path))
        with restored(matched.values(), name, always=True):
            return all(
                fingerprints_of(inject_layers(path, key, component, matched[key], name))
                == component.fingerprints
                for key, component in adapter.components.items()
            )
    except AdapterFileError:
        return False
