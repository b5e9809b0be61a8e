"""Reading what a native file holds out of a model's layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .factors import DATA_BASES, Factors
from .layer import NoraLayer
from .loading import dtype_name, saved_modules
from .native import Component, ModulePair


def needs_portable(layer: NoraLayer, adapter_name: str) -> bool:
    """Whether the outer pair cannot be derived from the base weight again."""
    basis = layer.nora_config[adapter_name].basis
    return layer.quantization_backend is not None or basis in DATA_BASES


def collect(
    name: str,
    model: nn.Module,
    layers: dict[str, NoraLayer],
    adapter_name: str,
    portable: bool,
    dtype: torch.dtype | None,
) -> Component:
    """Contents of a component from a model's layers.

    Raises:
        ValueError: the adapter trains what a file cannot hold, or holds NaN or infinity.
    """
    first = next(iter(layers.values()))
    config = first.nora_config[adapter_name]
    if config.bias != "none":
        raise ValueError(
            f"{name}: bias={config.bias!r} trains the base model's own biases, which cannot be "
            "loaded beside another adapter; train with bias='none', or keep the model with "
            "PeftModel.save_pretrained"
        )
    # A cast to 16 bits would round the initial product of init="sigma", not what was learnt.
    difference = dtype in (torch.float16, torch.bfloat16) and config.init == "sigma"
    modules: dict[str, ModulePair] = {}
    fingerprints: dict[str, str] = {}
    for module, layer in layers.items():
        layer.derive_factors(adapter_name)
        modules[module] = _module_pair(
            f"{name}.{module}", layer, adapter_name, portable, difference, dtype
        )
        fingerprints[module] = layer.outer(adapter_name).fingerprint or layer.base_fingerprint()
    saved = {
        owner: {k: _cast(f"{name}.{owner}.{k}", v, dtype) for k, v in copy.state_dict().items()}
        for owner, copy in saved_modules(model, adapter_name).items()
    }
    base_dtype = dtype_name(first.base_matrix())
    return Component(config, modules, fingerprints, base_dtype, difference, saved)


def _module_pair(
    name: str,
    layer: NoraLayer,
    adapter_name: str,
    portable: bool,
    difference: bool,
    dtype: torch.dtype | None,
) -> ModulePair:
    inner_A, inner_B = layer.nora_inner_A[adapter_name], layer.nora_inner_B[adapter_name]
    if difference and adapter_name in layer.nora_initial_A:
        inner_A = inner_A.float() - cast(Tensor, layer.nora_initial_A[adapter_name]).float()
        inner_B = inner_B.float() - cast(Tensor, layer.nora_initial_B[adapter_name]).float()
    outer = None
    if portable:
        pair = layer.outer(adapter_name)
        outer = Factors(
            outer_B=_cast(f"{name}.nora_outer_B", pair.outer_B, dtype),
            outer_A=_cast(f"{name}.nora_outer_A", pair.outer_A, dtype),
            singular_values=pair.singular_values,
            fingerprint=pair.fingerprint,
        )
    return ModulePair(
        _cast(f"{name}.nora_inner_A", inner_A, dtype),
        _cast(f"{name}.nora_inner_B", inner_B, dtype),
        outer,
    )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} holds NaN or infinite values"
            + (f" in {dtype}" if dtype is not None else "")
            + "; keep an earlier checkpoint, or save with dtype=torch.float32"
        )
    return tensor
