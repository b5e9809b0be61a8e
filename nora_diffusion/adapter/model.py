"""`NoraModel`: which module gets which layer, and when the outer factors are derived."""

# PEFT's and torch's own annotations are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .components import LOWERED_RANKS
from .config import NoraConfig
from .factors import DATA_BASES, factorise_many
from .layer import Conv2d, Linear, NoraLayer
from .targets import ATTENTION, attention_projections

_deferring: ContextVar[bool] = ContextVar("nora_deferred_factors", default=False)


def iter_nora_layers(model: nn.Module) -> Iterator[tuple[str, NoraLayer]]:
    """Yield ``(name, layer)`` of every NoRA layer of a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, NoraLayer):
            yield name, module


@contextmanager
def deferred_factors() -> Generator[None, None, None]:
    """Add adapters without deriving their outer factors, which the caller sets instead.

    For loaders that know the factors: ``with deferred_factors(): model.add_adapter(config)``, then
    `NoraLayer.set_factors` where they have them, and `derive_factors` for what is left.
    """
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


def derive_factors(model: nn.Module, adapter_name: str = "default") -> None:
    """Derive the outer factors that an adapter still lacks, modules side by side.

    Does nothing for bases that are fitted to data, and for modules without weights yet.

    Args:
        model: Any model with NoRA layers.
        adapter_name: The adapter.

    Raises:
        ValueError: A base weight holds NaN or infinity; the message names the module.
    """
    pending = [
        (name, layer)
        for name, layer in iter_nora_layers(model)
        if adapter_name in layer.nora_outer
        and not layer.outer(adapter_name).derived
        and layer.outer(adapter_name).spec.basis not in DATA_BASES
        and layer.base_device().type != "meta"
    ]
    # A quantised weight is a float copy while it waits, so few of them may wait at a time.
    quantised = any(layer.quantization_backend is not None for _, layer in pending)
    chunk = 8 if quantised else max(len(pending), 1)
    empty: list[str] = []
    for start in range(0, len(pending), chunk):
        part = pending[start : start + chunk]
        jobs = [layer.factor_job(adapter_name, name=name) for name, layer in part]
        for (name, layer), factors in zip(part, factorise_many(jobs), strict=True):
            layer.adopt_factors(adapter_name, factors)
            if not bool(factors.singular_values[0] > 0):
                empty.append(name)
    if empty:
        warnings.warn(
            f"NoRA: the weight of {len(empty)} module(s) is all zero, e.g. {empty[0]}; they get a "
            "seeded random basis and init='orthogonal'",
            stacklevel=2,
        )


class NoraModel(BaseTuner):
    """The tuner class that PEFT instantiates; `get_peft_model` and `add_adapter` use it."""

    prefix: str = "nora_"
    tuner_layer_cls = NoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject as PEFT does, then derive the outer factors of all modules side by side."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._warn_about_clamped_ranks(model, adapter_name)
        if not _deferring.get():
            derive_factors(model, adapter_name)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Resolve "attention" to module names, as PEFT does with "all-linear" right after this.

        So a saved config names the modules that were adapted, whatever a later version would find.
        """
        config = cast(NoraConfig, peft_config)
        if config.target_modules == ATTENTION:
            config.target_modules = set(attention_projections(model))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(NoraConfig, peft_config)
        r = _from_pattern(config.rank_pattern, current_key, config.r)
        inner_r = _from_pattern(config.inner_rank_pattern, current_key, config.inner_r)
        if isinstance(target, NoraLayer):
            target.update_layer(adapter_name, config, r, inner_r)
            return
        layer = self._create_new_module(target, current_key)
        layer.set_adapter([adapter_name])
        layer.update_layer(adapter_name, config, r, inner_r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter does not start trainable
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(self, target: nn.Module, key: str) -> Linear | Conv2d:
        base = cast(Any, target).get_base_layer() if hasattr(target, "get_base_layer") else target
        kwargs = get_quantization_kwargs(self)
        if isinstance(base, nn.Conv2d):
            if base.groups != 1:
                raise ValueError(
                    f"target module {key!r} is a convolution with {base.groups} groups; NoRA "
                    "adapts convolutions with groups=1 only, so leave it out (exclude_modules)"
                )
            return Conv2d(target, **kwargs)
        if isinstance(base, nn.Linear | Conv1D):
            return Linear(target, **kwargs)
        backend = resolve_quantization_backend(base, **kwargs)
        if backend is not None and backend.layer_type == "linear":
            return Linear(target, **kwargs)
        raise TypeError(
            f"target module {key!r} is a {type(base).__name__}; NoRA adapts torch.nn.Linear, "
            "torch.nn.Conv2d, transformers Conv1D and quantised linear layers; narrow "
            "target_modules, or leave it out (exclude_modules)"
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the inner pair in float32, or on request in the base layer's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in iter_nora_layers(cast(nn.Module, self.model)):
            layer.cast_inner_to_base(adapter_name)

    @staticmethod
    def _warn_about_clamped_ranks(model: nn.Module, adapter_name: str) -> None:
        clamped: list[str] = []
        for name, layer in iter_nora_layers(model):
            config = layer.nora_config.get(adapter_name)
            if config is None:
                continue
            r, inner_r = layer.r[adapter_name], layer.inner_r[adapter_name]
            if r < _from_pattern(config.rank_pattern, name, config.r) or inner_r < _from_pattern(
                config.inner_rank_pattern, name, config.inner_r
            ):
                clamped.append(f"{name} (r={r}, inner_r={inner_r})")
        if clamped:
            warnings.warn(
                f"{LOWERED_RANKS} in {len(clamped)} module(s), since r cannot exceed "
                f"the weight's smaller side nor inner_r exceed r, e.g. {clamped[0]}",
                stacklevel=2,
            )


def _from_pattern(pattern: dict[str, int], key: str, default: int) -> int:
    return pattern.get(get_pattern_key(list(pattern), key), default)
