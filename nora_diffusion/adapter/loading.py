"""Putting the contents of a native file onto models."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .components import adaptable_modules, inject, match_components, plain_name, walk
from .factors import Factors, cached_factors
from .header import AdapterFileError
from .keys import DENOISERS, find_module
from .layer import NoraLayer
from .model import deferred_factors, derive_factors, iter_nora_layers
from .native import Component, NativeAdapter, config_from_json, config_to_json

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
#: Names under which an adapter is found in a folder, best first.
FILE_NAMES = ("adapter.safetensors", LORA_FILE, PEFT_WEIGHTS)


class OtherBaseError(AdapterFileError):
    """The base weights are not those that a compact file was trained on.

    Attributes:
        trained: number format of the weights in training, such as "bfloat16".
        present: number format of the weights here. Where it is the same, the base is another model.
    """

    def __init__(self, message: str, trained: str, present: str) -> None:
        super().__init__(message)
        self.trained, self.present = trained, present


def add_native(
    path: Path, adapter: NativeAdapter, targets: dict[str, nn.Module], adapter_name: str
) -> dict[str, dict[str, NoraLayer]]:
    """Add an adapter to the models it was trained on; it becomes complete, but not scaled.

    The caller undoes what was done when this fails (`components.restored`).

    Args:
        path: where the file came from, for messages.
        adapter: its contents.
        targets: models by component name, from `components_of`.
        adapter_name: a name that none of the models uses.

    Returns:
        The layers by component name and module name.

    Raises:
        OtherBaseError: a compact file on weights with other fingerprints, whose own outer factors
            are not in the cache.
        AdapterFileError: the file does not fit the models.
    """
    matched = match_components(adapter.components, targets, str(path))
    layers: dict[str, dict[str, NoraLayer]] = {}
    for name, component in adapter.components.items():
        with _as_file_error(path, name):
            found = inject_layers(path, name, component, matched[name], adapter_name)
            _check_shapes(path, name, component, found, adapter_name)
            layers[name] = found
    # All fingerprints first: factorising one model is wasted if the next one does not fit.
    if not adapter.portable:
        _take_known_factors(path, adapter, layers, adapter_name)
    for name, component in adapter.components.items():
        with _as_file_error(path, name):
            if adapter.portable:
                _take_stored_factors(component, layers[name], adapter_name)
            else:
                derive_factors(matched[name], adapter_name)
            _set_inner(component, layers[name], adapter_name)
            _set_saved(path, name, component, matched[name], adapter_name)
    return layers


def inject_layers(
    path: Path, name: str, component: Component, model: nn.Module, adapter_name: str
) -> dict[str, NoraLayer]:
    """Add empty layers to the modules a component names; keys are the file's module names.

    Raises:
        AdapterFileError: the model lacks some of the modules.
    """
    available = adaptable_modules(model)
    places = {module: find_module(module, available) for module in component.modules}
    if missing := [module for module, place in places.items() if place is None]:
        raise AdapterFileError(
            f"{path}: {len(missing)} of its {len(places)} modules are not in this "
            f"{type(model).__name__}, e.g. {name}.{missing[0]}. Load it on the kind of base model "
            "it was trained on"
        )
    # A copy: PEFT rewrites the target modules of the config it is given.
    config = config_from_json(path, config_to_json(component.config))
    with deferred_factors():
        inject(model, config, adapter_name, (f"{place}.nora_inner_A" for place in places.values()))
    layers = nora_layers(model, adapter_name)
    if set(layers) != set(places.values()):
        raise AdapterFileError(
            f"{path}: only {len(layers)} of {len(places)} modules of {name} could be adapted"
        )
    return {module: layers[cast(str, place)] for module, place in places.items()}


def find_files(path: Path) -> list[Path]:
    """The adapter files that a path means: itself, the best one of a folder, or those of an export.

    An export in the layout "peft" that adapts several models has a sub-folder for each, and is one
    adapter; everything else is one file.

    Raises:
        AdapterFileError: a folder without adapter file.
    """
    path = path.expanduser()
    if not path.is_dir():
        return [path]
    for name in FILE_NAMES:
        if (path / name).is_file():
            return [path / name]
    parts = [
        file
        for file in sorted(path.glob(f"*/{PEFT_WEIGHTS}"))
        if file.parent.name in DENOISERS or file.parent.name.startswith("text_encoder")
    ]
    if len(parts) > 1:
        return parts
    raise AdapterFileError(
        f"{path}: this folder has none of {', '.join(FILE_NAMES)}, nor sub-folders of a PEFT "
        "export; give the adapter file itself"
    )


def nora_layers(model: nn.Module, adapter_name: str) -> dict[str, NoraLayer]:
    """Layers that have an adapter, by the name of the module they adapt."""
    return {
        plain_name(name): layer
        for name, layer in iter_nora_layers(model)
        if adapter_name in layer.nora_outer
    }


def open_base(base: Any, adapter: NativeAdapter) -> Any:
    """A base model that may be given by name: loaded as the adapter needs it, or as it is.

    Args:
        base: a pipeline, a model, or what `load_pipeline` takes.
        adapter: a named base is loaded in the dtype that this adapter was trained in, without
            which the fingerprints of a compact file cannot agree.
    """
    if not isinstance(base, str | Path):
        return base
    # By the package's public name, at run time: the adapter module knows no model families.
    import nora_diffusion

    names = {component.base_dtype for component in adapter.components.values()}
    known = len(names) == 1 and names <= {"float32", "float16", "bfloat16"}
    kwargs = {"dtype": getattr(torch, names.pop())} if known else {}
    return nora_diffusion.load_pipeline(base, **kwargs)


def fingerprints_of(layers: Mapping[str, NoraLayer]) -> dict[str, str]:
    """Fingerprint of the base weight under each layer."""
    # hashlib lets go of the interpreter lock, so threads hash side by side.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(NoraLayer.base_fingerprint, layers.values())
        return dict(zip(layers, digests, strict=True))


@contextmanager
def _as_file_error(path: Path, name: str) -> Generator[None]:
    try:
        yield
    except AdapterFileError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: {name} cannot take this adapter: {error}") from error


def _check_shapes(
    path: Path,
    name: str,
    component: Component,
    layers: dict[str, NoraLayer],
    adapter_name: str,
) -> None:
    for module, pair in component.modules.items():
        layer = layers[module]
        if layer.weight.is_meta:
            raise AdapterFileError(
                f"{path}: the weight of {name}.{module} is not in memory (sequential or group "
                "offloading?). Load the adapter before you turn offloading on"
            )
        wanted = (layer.inner_r[adapter_name], layer.r[adapter_name])
        outer = pair.outer
        fits = tuple(pair.inner_A.shape) == wanted
        if outer is not None:
            sides = (outer.outer_B.shape[0], outer.outer_A.shape[1])
            fits &= sides == (layer.out_features, layer.in_features)
        if not fits:
            raise AdapterFileError(
                f"{path}: {name}.{module} was trained on a weight of another shape than the "
                f"{layer.out_features} x {layer.in_features} here. Load it on the base model it "
                "was trained on"
            )


def _take_known_factors(
    path: Path,
    adapter: NativeAdapter,
    layers: dict[str, dict[str, NoraLayer]],
    adapter_name: str,
) -> None:
    """Take cached outer factors, and leave to be derived what this base's own weights give.

    Raises:
        OtherBaseError: for some module there is neither.
    """
    foreign: list[str] = []
    formats: list[tuple[str, str]] = []  # in training and here, of every component that differs
    for name, component in adapter.components.items():
        present = fingerprints_of(layers[name])
        for module, layer in layers[name].items():
            recorded = component.fingerprints[module]
            own = present[module] == recorded
            if own and layer.outer(adapter_name).derived:
                continue  # shared with an adapter that is there already
            spec = layer.outer(adapter_name).spec
            factors = cached_factors(recorded, spec.r, spec.basis, spec.seed)
            if own and factors is not None:
                layer.adopt_factors(adapter_name, factors)
            elif factors is not None and _is_rounding_of(layer.base_matrix(), factors):
                layer.set_factors(adapter_name, factors)
            elif not own:
                foreign.append(f"{name}.{module}")
        if foreign and foreign[-1].startswith(f"{name}."):
            # Of the first layer, as it was recorded.
            formats.append((component.base_dtype, number_format(next(iter(layers[name].values())))))
    if foreign:
        total = sum(len(component.modules) for component in adapter.components.values())
        # One component in its own format that differs is enough to be another model.
        trained, present = next((pair for pair in formats if pair[0] == pair[1]), formats[0])
        message = _other_base_message(path, adapter, foreign, total, trained, present)
        raise OtherBaseError(message, trained, present)


def _is_rounding_of(weight: Tensor, factors: Factors) -> bool:
    """Whether a weight ``W (out, in)`` is the one the factors come from, in another dtype.

    For that one ``U^T W V^T`` is the diagonal of singular values. Rounding to bfloat16 moves its
    entries by about 0.1 % of the size of W's own entries, fine-tuning or another model by several
    per cent or far more; the line is drawn at 1 %.
    """
    W = weight.to(torch.float32)
    U, V = factors.outer_B.to(W), factors.outer_A.to(W)
    if (U.shape[0], V.shape[1]) != W.shape:
        return False
    error = U.mT @ W @ V.mT - torch.diag(factors.singular_values.to(W))
    return bool(error.square().mean() <= 1e-4 * W.square().mean())


def _other_base_message(
    path: Path, adapter: NativeAdapter, foreign: list[str], total: int, trained: str, present: str
) -> str:
    base = adapter.about.get("base") or "its base model"
    if trained != present:
        cure = (
            f"was trained on {base} in {trained}, and this model is in {present}. Load the base "
            f"with dtype=torch.{trained}"
        )
    else:
        known = adapter.about.get("base_hash")
        cure = f"was trained on {base}{f' ({known})' if known else ''}. Load it on that base"
    return (
        f"{path}: a compact file derives its outer factors from the base weights, and "
        f"{len(foreign)} of {total} modules have other weights here, e.g. {foreign[0]}: it {cure}; "
        "or take a file that carries its factors, saved on that base with "
        "save_adapter(..., portable=True) or exported with export_lora(...)"
    )


def _take_stored_factors(
    component: Component, layers: dict[str, NoraLayer], adapter_name: str
) -> None:
    for module, pair in component.modules.items():
        if pair.outer is not None:
            layers[module].set_factors(adapter_name, pair.outer)


@torch.no_grad()
def _set_inner(component: Component, layers: dict[str, NoraLayer], adapter_name: str) -> None:
    for module, pair in component.modules.items():
        layer = layers[module]
        stores = (
            (layer.nora_inner_A, layer.nora_initial_A, pair.inner_A),
            (layer.nora_inner_B, layer.nora_initial_B, pair.inner_B),
        )
        for inner, initial, stored in stores:
            value = stored.to(inner[adapter_name])
            if component.difference and adapter_name in initial:
                value = value + cast(Tensor, initial[adapter_name])
            inner[adapter_name].copy_(value)


def _set_saved(
    path: Path, name: str, component: Component, model: nn.Module, adapter_name: str
) -> None:
    copies = saved_modules(model, adapter_name)
    places = {owner: find_module(owner, copies) for owner in component.saved}
    if set(places.values()) != set(copies):
        raise AdapterFileError(
            f"{path}: {name} has the fully trained modules {sorted(places)} in the file and "
            f"{sorted(copies)} here. Load it on the kind of base model it was trained on"
        )
    for owner, parameters in component.saved.items():
        copies[cast(str, places[owner])].load_state_dict(parameters, strict=True)


def saved_modules(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The adapter's own copies of the modules that it trains in full (`modules_to_save`)."""
    found: dict[str, nn.Module] = {}
    for name, module in walk(model):
        if isinstance(module, ModulesToSaveWrapper):
            copies = cast("dict[str, Any]", module.modules_to_save)
            if adapter_name in copies:
                found[name] = cast(nn.Module, copies[adapter_name])
    return found


def number_format(layer: NoraLayer) -> str:
    """Number format of a layer's weight, e.g. "bfloat16" or "bfloat16, quantised"."""
    quantised = ", quantised" if layer.quantization_backend is not None else ""
    return dtype_name(layer.base_matrix()) + quantised


def dtype_name(tensor: Tensor) -> str:
    """Name of a tensor's dtype as torch spells it, e.g. "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
