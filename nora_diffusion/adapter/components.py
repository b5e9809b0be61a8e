"""The models inside what a user hands over, and changing them completely or not at all."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .header import AdapterFileError
from .keys import BARE_MODEL, DENOISERS

LOWERED_RANKS = "NoRA: the ranks are lowered"
"""How the warning of ranks above a weight's side begins."""


def components_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Models that can carry an adapter, by component name.

    Args:
        pipe_or_model: a diffusers pipeline (every model in its `components`), or one model, which
            may be compiled or a `PeftModel`; its only component is called "model".

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(pipe_or_model, nn.Module):
        return {BARE_MODEL: _unwrap(pipe_or_model)}
    parts = getattr(pipe_or_model, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(
            "expected a diffusers pipeline or a torch.nn.Module, got "
            f"{type(pipe_or_model).__name__}"
        )
    named = cast("dict[str, Any]", parts)
    return {name: _unwrap(part) for name, part in named.items() if isinstance(part, nn.Module)}


def match_components(
    names: Iterable[str], targets: dict[str, nn.Module], origin: str
) -> dict[str, nn.Module]:
    """Model for each component that a file names.

    A bare model takes a file of one component whatever its name is there, and a file saved from a
    bare model goes to a pipeline's denoiser: module names and fingerprints decide whether it fits.

    Raises:
        AdapterFileError: the file has a component that is not there.
    """
    names = list(names)
    if list(targets) == [BARE_MODEL]:
        if len(names) > 1:
            raise AdapterFileError(
                f"{origin}: adapts {', '.join(names)}, but one model was given; load it into the "
                "whole pipeline"
            )
        return {names[0]: targets[BARE_MODEL]}
    denoiser = next((targets[name] for name in DENOISERS if name in targets), None)
    if BARE_MODEL in names and len(names) > 1:
        raise AdapterFileError(f"{origin}: mixes a bare model with parts of a pipeline")
    matched: dict[str, nn.Module] = {}
    for name in names:
        model = denoiser if name == BARE_MODEL else targets.get(name)
        if model is None:
            raise AdapterFileError(
                f"{origin}: adapts {name!r}, which this pipeline lacks (it has "
                f"{', '.join(targets)}); load it into a pipeline of the kind it was trained on"
            )
        matched[name] = model
    return matched


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of a model and all that is in it (torch's own stub leaves both unknown)."""
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The table in which a module keeps its submodules; changing it changes the module."""
    return cast("dict[str, nn.Module | None]", module.__dict__["_modules"])


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name it has without adapters; an adapted one as its adapter layer."""
    found: dict[str, nn.Module] = {}
    inside = ""
    for name, module in walk(model):
        if inside and name.startswith(inside):
            continue
        found[name] = module
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else ""
    return found


def plain_name(name: str) -> str:
    """Name of an adapted module without the levels that nested adapter layers add."""
    return name.replace(".base_layer", "")


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Name and module of every adapter layer, of whatever PEFT method."""
    for name, module in walk(model):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """Adapters that a model has."""
    return list(cast("dict[str, Any]", getattr(model, "peft_config", None) or {}))


def check_name_is_free(models: Iterable[nn.Module], adapter_name: str) -> None:
    """Refuse an adapter name that one of the models uses.

    Raises:
        ValueError: it does.
    """
    for model in models:
        if adapter_name in adapter_names(model):
            raise ValueError(
                f"the adapter name {adapter_name!r} is in use (adapters: "
                f"{', '.join(adapter_names(model))}); pass another adapter_name, or delete that one"
            )


def check_arguments(adapter_name: Any, weight: Any) -> None:
    """Refuse what cannot be an adapter's name or weight.

    Raises:
        TypeError: the name is no text, or the weight no number.
        ValueError: an empty name or one with a dot, or a weight that is not finite.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name={adapter_name!r}: give a text, such as 'default'")
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r}: a name cannot be empty or have a dot in it, as it "
            "becomes part of module names; give another one, such as 'default'"
        )
    if not isinstance(weight, Real):
        raise TypeError(f"weight={weight!r}: give a number, such as 1.0")
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight!r}: give a finite number, such as 1.0")


def ignore_lowered_ranks() -> None:
    """Add a filter of the warning of ranks above a weight's side, for what tells of it or need not.

    For use within ``warnings.catch_warnings``.
    """
    warnings.filterwarnings("ignore", message=LOWERED_RANKS)


def inject(
    model: nn.Module, config: PeftConfig, adapter_name: str, parameter_keys: Iterable[str]
) -> None:
    """Add an adapter to exactly the modules that own the given parameter keys."""
    with warnings.catch_warnings():
        # A second adapter on a model is no surprise here, and the modules come from the file: that
        # the config's patterns would match others too (on a larger base) does not matter.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
        ignore_lowered_ranks()
        keys = cast("dict[str, Tensor]", dict.fromkeys(parameter_keys))
        inject_adapter_in_model(config, model, adapter_name, state_dict=keys)
    # diffusers and transformers ask this flag before they touch `peft_config`.
    cast(Any, model)._hf_peft_config_loaded = True


def activate(model: nn.Module, adapter_name: str, weight: float, before: Snapshot) -> None:
    """Make an added adapter active beside those that were, with `weight` as its scale.

    Layers that `disable_lora` or the like had switched off are switched on again.
    """
    names = [name for name in before.active if name != adapter_name] + [adapter_name]
    for _, layer in tuner_layers(model):
        layer._disable_adapters = False
        layer.set_adapter(names)
        cast(Any, layer).set_scale(adapter_name, weight)
    before.restore_gradients()


@dataclass
class Snapshot:
    """What adding an adapter changes in a model, as it was before.

    Attributes:
        active: adapters that were active, in order.
    """

    model: nn.Module
    active: list[str]
    _children: dict[nn.Module, dict[str, nn.Module | None]]
    _gradients: list[tuple[nn.Parameter, bool]]
    _merged: list[tuple[BaseTunerLayer, list[str]]]
    _disabled: list[BaseTunerLayer]
    _configs: dict[str, Any] | None
    _flag: Any

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Remember a model's modules, trainability and adapter registry (no tensor is copied)."""
        configs = getattr(model, "peft_config", None)
        active: list[str] = []
        merged: list[tuple[BaseTunerLayer, list[str]]] = []
        disabled: list[BaseTunerLayer] = []
        for _, layer in tuner_layers(model):
            merged += [(layer, list(layer.merged_adapters))] if layer.merged else []
            disabled += [layer] if layer.disable_adapters else []
            active += [name for name in layer.active_adapters if name not in active]
        return cls(
            model=model,
            active=active,
            _children={module: dict(children_of(module)) for module in model.modules()},
            _gradients=[(p, p.requires_grad) for p in model.parameters()],
            _merged=merged,
            _disabled=disabled,
            _configs=None if configs is None else dict(cast("dict[str, Any]", configs)),
            _flag=getattr(model, "_hf_peft_config_loaded", None),
        )

    def restore_gradients(self) -> None:
        """Give every parameter that was there its `requires_grad` back."""
        for parameter, requires_grad in self._gradients:
            parameter.requires_grad_(requires_grad)

    def restore(self, adapter_name: str) -> None:
        """Remove an added adapter and every module that was put in for it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"Adapter {re.escape(adapter_name)} was")
            for module in self._children:
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(adapter_name)
                    module.set_adapter(self.active)
        for module, children in self._children.items():
            children_of(module).clear()
            children_of(module).update(children)
        model = cast(Any, self.model)
        if self._configs is None:
            if hasattr(model, "peft_config"):
                del model.peft_config
        else:
            model.peft_config.clear()
            model.peft_config.update(self._configs)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = self._flag
        for layer in self._disabled:
            layer._disable_adapters = True
        self.restore_gradients()
        for layer, names in self._merged:
            if not layer.merged:  # PEFT unmerges a model before it changes its adapters
                layer.merge(adapter_names=names)


@contextmanager
def restored(
    models: Iterable[nn.Module], adapter_name: str, always: bool = False
) -> Generator[dict[nn.Module, Snapshot]]:
    """Take an added adapter out of all models again if the block fails, or `always`."""
    snapshots = {model: Snapshot.of(model) for model in models}
    done = False
    try:
        yield snapshots
        done = True
    finally:
        if always or not done:
            for snapshot in snapshots.values():
                snapshot.restore(adapter_name)


def _unwrap(model: nn.Module) -> nn.Module:
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # torch.compile
    get_base_model = getattr(model, "get_base_model", None)  # PeftModel
    return cast(nn.Module, get_base_model()) if callable(get_base_model) else model
