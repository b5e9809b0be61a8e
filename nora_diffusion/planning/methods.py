"""LoRA, LoRA-XS and NoRA on a model without contents: their real layers, counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft import LoraConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nora_diffusion import __version__
from nora_diffusion.adapter import NoraConfig, NoraLayer, deferred_factors, iter_nora_layers
from nora_diffusion.adapter.components import ignore_lowered_ranks, plain_name, restored
from nora_diffusion.adapter.header import CHECKSUM_KEY, size_of
from nora_diffusion.adapter.keys import Dialect
from nora_diffusion.adapter.lora_file import encode as encode_lora
from nora_diffusion.adapter.native import Component, ModulePair, NativeAdapter
from nora_diffusion.adapter.native import encode as encode_native
from nora_diffusion.families.base import DTYPES
from nora_diffusion.targets import Choice, Target
from nora_diffusion.train.live_memory import bytes_of

_NAME = "plan"
_FILE_FORMATS = ("fp16", "fp32")
TRAINED_BYTES = 4
"""Of a trained number, its gradient, and each of AdamW's two means: float32 in every method."""


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: "LoRA", "LoRA-XS" or "NoRA".
        r: rank; NoRA's outer rank.
        inner_r: NoRA's inner rank.
    """

    name: str
    r: int
    inner_r: int = 0

    def __str__(self) -> str:
        inner = f", inner r {self.inner_r}" if self.inner_r else ""
        return f"{self.name} r {self.r}{inner}"


@dataclass(frozen=True)
class Counted:
    """What a method's layers hold.

    Attributes:
        trained: numbers trained.
        outer_bytes: frozen factors beside the weights, in the model's number format.
        file_bytes: the smallest adapter file that a program loads, by number format; LoRA-XS has
            no such file, so its trained numbers alone.
        lora_bytes: file in the layout of a LoRA, exact.
    """

    trained: int
    outer_bytes: int
    file_bytes: dict[str, int]
    lora_bytes: dict[str, int]


def methods(
    targets: list[Target], r: int, inner_r: int, lora_r: int, xs_r: int | None
) -> list[Method]:
    """The three methods; without a rank of its own LoRA-XS trains about what NoRA does."""
    mean = sum(target.nora for target in targets) / len(targets)
    return [
        Method("LoRA", lora_r),
        Method("LoRA-XS", xs_r or max(1, round(math.sqrt(mean)))),
        Method("NoRA", r, inner_r),
    ]


@contextmanager
def adapted(choice: Choice, targets: list[Target], method: Method) -> Generator[None]:
    """A method's layers on the modules, for the time of the block.

    LoRA-XS computes the products of a NoRA layer whose core is dense, so it is one here.
    """
    model = choice.model
    with warnings.catch_warnings(), restored([model], _NAME, always=True):
        ignore_lowered_ranks()
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        if method.name == "LoRA":
            _add_lora(model, [target.name for target in targets], method.r)
        else:
            inner_r = method.inner_r or method.r
            config = NoraConfig(r=method.r, inner_r=inner_r, target_modules=choice.targets)
            with deferred_factors():
                inject_adapter_in_model(config, model, _NAME)
            for _, layer in iter_nora_layers(model):
                layer.outer(_NAME).derived = True
        yield


def count(choice: Choice, method: Method) -> Counted:
    """What the layers of an `adapted` model hold."""
    trained = [p for p in choice.model.parameters() if p.requires_grad]
    if method.name == "LoRA":
        pairs = {
            plain_name(name): _lora_pair(layer)
            for name, layer in choice.model.named_modules()
            if isinstance(layer, LoraLayer) and _NAME in layer.lora_A
        }
        files = _lora_files(choice, pairs)
        return Counted(sum(p.numel() for p in trained), 0, files, files)
    layers = {plain_name(name): layer for name, layer in iter_nora_layers(choice.model)}
    outer = bytes_of(
        t for layer in layers.values() for t in layer.outer(_NAME).buffers() if t.ndim > 1
    )
    if method.name == "LoRA-XS":
        numbers = sum(layer.r[_NAME] ** 2 for layer in layers.values())
        pairs = {name: _factors(layer) for name, layer in layers.items()}
        files = {kind: numbers * DTYPES[kind].itemsize for kind in _FILE_FORMATS}
        return Counted(numbers, outer, files, _lora_files(choice, pairs))
    pairs = {name: layer.lora_factors(_NAME) for name, layer in layers.items()}
    files = {kind: _native_bytes(choice, layers, DTYPES[kind]) for kind in _FILE_FORMATS}
    return Counted(sum(p.numel() for p in trained), outer, files, _lora_files(choice, pairs))


def _add_lora(model: nn.Module, names: list[str], r: int) -> None:
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    # In a holder without config: of a mixture of experts that it knows, PEFT would put layers on
    # the fused experts in place of the linear layers that are named.
    holder = nn.ModuleDict({"held": model})
    targets = [f"held.{name}" for name in names]
    config = LoraConfig(r=r, target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, holder, _NAME, low_cpu_mem_usage=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # as PEFT does where there are weights
            dtype = cast(Any, module.get_base_layer()).weight.dtype
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)


def _lora_pair(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    return cast(Any, layer.lora_A[_NAME]).weight, cast(Any, layer.lora_B[_NAME]).weight


def _factors(layer: NoraLayer) -> tuple[Tensor, Tensor]:
    """The pair whose product is a dense core between the outer factors."""
    outer = layer.outer(_NAME)
    return outer.outer_A, outer.outer_B


def _lora_files(choice: Choice, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    layout = "peft" if choice.family is None else "diffusers"
    component = _component(choice)
    return {
        kind: size_of(
            encode_lora({component: pairs}, layout, Dialect(), DTYPES[kind]), {"format": "pt"}
        )
        for kind in _FILE_FORMATS
    }


def _native_bytes(choice: Choice, layers: dict[str, NoraLayer], dtype: torch.dtype) -> int:
    """Of the compact file: `save_adapter` with what it says when it is told nothing more."""
    modules = {
        name: ModulePair(layer.nora_inner_A[_NAME].to(dtype), layer.nora_inner_B[_NAME].to(dtype))
        for name, layer in layers.items()
    }
    component = Component(
        config=next(iter(layers.values())).nora_config[_NAME],
        modules=modules,
        fingerprints=dict.fromkeys(layers, "0" * 64),
        base_dtype=str(next(choice.model.parameters()).dtype).removeprefix("torch."),
    )
    versions = {
        "nora_diffusion": __version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__),
    }
    about = {"base": None, "versions": versions}
    adapter = NativeAdapter({_component(choice): component}, portable=False, about=about)
    tensors, metadata = encode_native(adapter)
    return size_of(tensors, {**metadata, CHECKSUM_KEY: "0" * 64})


def _component(choice: Choice) -> str:
    return "model" if choice.family is None else choice.family.components.denoiser_name
