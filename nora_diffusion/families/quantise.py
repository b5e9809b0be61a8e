"""Frozen linear layers in 4 or 8 bits: nf4 by bitsandbytes, int8 and fp8 by torchao.

Where diffusers and transformers can, they quantise each weight as it is read, so that the whole
model never lies in main memory; what they leave (one-file checkpoints, nf4 without a GPU) is
quantised after loading. The denoiser is quantised, and every text encoder but CLIP, which is small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nora_diffusion.config import UserError

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""Mode to the library that does it."""

DENOISERS = ("unet", "transformer")
_NF4_BLOCK = 64  # weights that share a scale, and
_NF4_SCALES = 256  # scales that share a scale of their own (Dettmers et al. 2023, section 3)


def check_library(mode: str) -> None:
    """Refuse a mode whose library is missing.

    Raises:
        UserError: naming the extra that brings it.
    """
    library = LIBRARIES[mode]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f'model.quantize = "{mode}": {library} is not installed; run: '
            'pip install "nora-diffusion[quant]", or use "none"'
        )


def is_quantised_part(name: str, class_name: str) -> bool:
    """Whether a part of a pipeline is quantised: the denoiser, and text encoders but CLIP."""
    large = name.startswith("text_encoder") and not class_name.startswith("CLIP")
    return name in DENOISERS or large


def while_loading(source: str | Path, mode: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` is given so that it quantises as it reads; empty: it cannot.

    Args:
        source: a diffusers folder or hub id, or one file.
        mode: "nf4", "int8" or "fp8".
        dtype: number format of what is computed.

    Raises:
        UserError: when the library is missing.
    """
    check_library(mode)
    if isinstance(source, Path) and source.is_file():
        return {}
    if mode == "nf4" and not torch.cuda.is_available():  # diffusers refuses
        return {}
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    index: dict[str, Any] = dict(DiffusionPipeline.load_config(str(source)))  # pyright: ignore
    mapping = {
        name: _library_config(entry[0], mode, dtype)
        for name, entry in index.items()
        if isinstance(entry, list | tuple) and entry[1] and is_quantised_part(name, str(entry[1]))
    }
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def after_loading(pipe: Any, mode: str, dtype: torch.dtype) -> None:
    """Quantise what was loaded in full, and make what torchao quantised fit for training."""
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or not is_quantised_part(name, type(part).__name__):
            continue
        if getattr(part, "hf_quantizer", None) is None:
            _quantise(part, mode, dtype)
        if mode != "nf4":
            for _, linear in linears(part, mode):
                if type(linear) is nn.Linear and is_torchao(linear.weight):
                    linear.__class__ = FrozenLinear


def is_torchao(weight: Any) -> bool:
    """Whether a weight is one of torchao's tensors."""
    return hasattr(weight, "__tensor_flatten__")


def linears(module: nn.Module, mode: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model that a mode quantises, by name."""
    kept = ["lm_head"]  # often one tensor with the embedding
    if mode == "nf4":  # T5 casts to the format of such a weight, which must not be that of codes
        kept += getattr(module, "_keep_in_fp32_modules", None) or []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not any(part in kept for part in name.split(".")):
            yield name, layer


def bytes_saved(pipe: Any, mode: str) -> dict[str, int]:
    """Bytes that quantising takes off the weights of each part, by its name, from shapes alone."""
    return {
        name: sum(
            layer.weight.nbytes - quantised_bytes(layer.weight, mode)
            for _, layer in linears(part, mode)
        )
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and is_quantised_part(name, type(part).__name__)
    }


def quantised_bytes(weight: Tensor, mode: str) -> int:
    """Bytes of an ``(out, in)`` weight in a mode, its scales included."""
    count = weight.numel()
    if mode == "nf4":  # half a byte each, 8-bit scales, and the float32 scales of these
        scales = -(-count // _NF4_BLOCK)
        return -(-count // 2) + scales + 4 * -(-scales // _NF4_SCALES)
    # For each row a float32 scale, and for int8 a zero point of one byte.
    return count + weight.shape[0] * (4 if mode == "fp8" else 5)


class FrozenLinear(nn.Linear):
    """A linear layer with a quantised weight, for a pass through it that trains something else.

    Left to itself autograd keeps the dequantised weight of every layer for the backward pass, more
    than the unquantised model takes; here one weight at a time is dequantised again.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _FrozenLinear.apply(input, self.weight, self.bias)  # pyright: ignore
        return F.linear(input, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.dequantize().to(gradients[0].dtype), None, None


def _library_config(library: str, mode: str, dtype: torch.dtype) -> Any:
    """The quantisation config of diffusers or transformers."""
    module = importlib.import_module("diffusers" if library == "diffusers" else "transformers")
    if mode == "nf4":
        return module.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return module.TorchAoConfig(_torchao_config(mode))


def _torchao_config(mode: str) -> Any:
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    return (
        quantization.Int8WeightOnlyConfig()
        if mode == "int8"
        else quantization.Float8WeightOnlyConfig()
    )


def _quantise(module: nn.Module, mode: str, dtype: torch.dtype) -> None:
    """Replace the weights of a loaded model, one after another."""
    module.to(dtype)
    for name, linear in list(linears(module, mode)):
        module.set_submodule(name, quantise_layer(linear, mode, dtype))
    if mode != "nf4":  # where PEFT looks for it, to quantise again after a merge
        config = _torchao_config(mode)
        described = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
        module.hf_quantizer = SimpleNamespace(quantization_config=described)  # pyright: ignore


def quantise_layer(linear: nn.Linear, mode: str, dtype: torch.dtype) -> nn.Module:
    """One linear layer, quantised: itself, or the one to put in its place."""
    if mode == "nf4":
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        return _nf4(bitsandbytes, linear, dtype)
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(linear, _torchao_config(mode))
    return linear


def _nf4(bitsandbytes: Any, linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    has_bias = linear.bias is not None
    with torch.device("meta"):
        quantised = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=has_bias, compute_dtype=dtype,
            quant_type="nf4", compress_statistics=True,
        )  # fmt: skip
    quantised.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
        module=quantised,
    )  # fmt: skip
    quantised.bias = linear.bias
    return quantised.to(linear.weight.device).requires_grad_(False)
