"""Several loaded adapters at once: how strong each is, and taking one out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .components import adapter_names, children_of, components_of, tuner_layers
from .layer import NoraLayer

Undo = Callable[[], None]


def set_weights(pipe_or_model: Any, weights: Mapping[str, float]) -> None:
    """Make these adapters the active ones; their effects add up.

    Args:
        pipe_or_model: a diffusers pipeline, or one model.
        weights: factor on the effect of each adapter by its name. Adapters left out are switched
            off; an empty mapping leaves the base model's own answers.
    """
    for model in components_of(pipe_or_model).values():
        for _, layer in tuner_layers(model):
            layer._disable_adapters = False
            layer.set_adapter(list(weights), inference_mode=True)
            for name, weight in weights.items():
                cast(Any, layer).set_scale(name, weight)


@torch.no_grad()
def fold(pipe_or_model: Any, weights: Mapping[str, float]) -> Undo | None:
    """Do as ``set_weights``, with the effects inside the weights: forward passes cost no more.

    The base weights themselves are kept, so there must be memory for a second copy of the adapted
    ones, and what is undone is exact to the last bit. Nothing may be loaded, saved or removed
    before that.

    Returns:
        What undoes it; None where an effect does not fit into a weight (it depends on the timestep,
        or the weights are quantised): then the adapters stay beside the weights.
    """
    set_weights(pipe_or_model, weights)
    used = [name for name, weight in weights.items() if weight != 0]
    towers = [
        tower
        for model in components_of(pipe_or_model).values()
        for tower in _towers(model)
        if any(name in layer.scaling for layer in tower for name in used)
    ]
    if not all(_can_fold(layer, name) for tower in towers for layer in tower for name in used):
        return None
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for tower in towers:
        weight = cast(nn.Parameter, tower[-1].get_base_layer().weight)
        total = weight.detach().clone()
        for layer in tower:
            for name in used:
                if name in layer.scaling:
                    total += layer.get_delta_weight(name).to(total)
            layer._disable_adapters = True
        kept.append((weight, weight.data))
        weight.data = total

    def undo() -> None:
        for weight, original in kept:
            weight.data = original
        for tower in towers:
            for layer in tower:
                layer._disable_adapters = False

    return undo


def remove_adapter(pipe_or_model: Any, adapter_name: str) -> None:
    """Take an adapter off all models; layers that no other adapter needs go with it.

    Args:
        pipe_or_model: a diffusers pipeline, or one model.
        adapter_name: which one; it must not be folded or merged into the weights.
    """
    for model in components_of(pipe_or_model).values():
        if adapter_name not in adapter_names(model):
            continue
        for _, layer in list(tuner_layers(model)):
            names = [name for name in layer.active_adapters if name != adapter_name]
            layer.set_adapter(names, inference_mode=True)
            layer.delete_adapter(adapter_name)
        cast("dict[str, Any]", model.peft_config).pop(adapter_name)
        for module in list(model.modules()):
            children = children_of(module)
            children.update({name: _needed(child) for name, child in children.items()})


def _needed(module: nn.Module | None) -> nn.Module | None:
    """A module without the adapter layers on it that have no adapter left."""
    while isinstance(module, BaseTunerLayer) and not cast(Any, module).scaling:
        module = cast(Any, module).base_layer
    return module


def _towers(model: nn.Module) -> list[list[Any]]:
    """Adapter layers by the module they adapt, the outermost first: kinds may lie in another."""
    towers: dict[nn.Module, list[Any]] = {}
    for _, layer in tuner_layers(model):
        towers.setdefault(layer.get_base_layer(), []).append(layer)
    return list(towers.values())


def _can_fold(layer: Any, adapter_name: str) -> bool:
    if adapter_name not in layer.scaling:
        return True
    if isinstance(layer, NoraLayer):
        law = layer.nora_config[adapter_name].timestep_rank
        return law is None and layer.quantization_backend is None
    plain = adapter_name not in getattr(layer, "lora_variant", {adapter_name})  # no DoRA, say
    bias = getattr(layer, "lora_bias", {}).get(adapter_name, False)
    weight = getattr(layer.get_base_layer(), "weight", None)
    return plain and not bias and isinstance(weight, Tensor) and weight.is_floating_point()
