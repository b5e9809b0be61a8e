"""Loading the parts of a base model, and freezing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nora_diffusion.families.base import Components


def pretrained(source: str | Path, **kwargs: Any) -> Any:
    """The pipeline of a diffusers folder or hub id, on the CPU.

    Args:
        source: the folder or id.
        kwargs: for ``from_pretrained``; ``dtype`` is float32 where not given. Left to itself,
            diffusers reads the denoiser in float32, but transformers the text encoder in the dtype
            of the file, and the two do not work together.
    """
    kwargs.setdefault("dtype", torch.float32)
    return DiffusionPipeline.from_pretrained(str(source), use_safetensors=True, **kwargs)


def part_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Number formats to load a base in: the autoencoder in float32, all else as asked for."""
    return {"default": dtype, "vae": torch.float32}


def is_staged(device: torch.device) -> bool:
    """Whether a run's parts come to the device one after another: where it has its own memory."""
    return device.type == "cuda"


def frozen_parts(
    pipe: Any, base: str, denoiser_name: str, *, dtype: torch.dtype, device: torch.device
) -> Components:
    """Freeze the models of a pipeline and bring them to device and number format.

    Text encoders that the pipeline was loaded without are left out.
    """
    pipe.set_progress_bar_config(disable=True)
    names = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    encoders = tuple(name for name in names if getattr(pipe, name) is not None)
    for name in (denoiser_name, *encoders, "vae"):
        module = getattr(pipe, name).requires_grad_(False).eval().to(device)
        wanted = torch.float32 if name == "vae" else dtype
        if module.dtype != wanted and getattr(module, "hf_quantizer", None) is None:
            module.to(wanted)
    return Components(base, pipe, denoiser_name, encoders, device, dtype)
