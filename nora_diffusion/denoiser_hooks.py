"""What the diffusion side hangs on a denoiser for the adapter layers, which know no timesteps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nora_diffusion.adapter import NoraLayer, files, iter_nora_layers

_LATENTS = ("sample", "hidden_states", "x")  # as UNets, transformers and Z-Image call them
_ATTRIBUTE = "_nora_timestep_rank_hook"

TIMESTEP_RANGES = {
    "FluxTransformer2DModel": (0.0, 1.0),
    "Flux2Transformer2DModel": (0.0, 1.0),
    "ZImageTransformer2DModel": (1.0, 0.0),
}
"""Timesteps of a picture and of pure noise, of denoisers that are given sigma or 1 - sigma."""


def attach_timestep_rank(denoiser: nn.Module, num_train_timesteps: float = 1000) -> RemovableHandle:
    """Tell the denoiser's NoRA layers the noise level of each sample before every forward pass.

    Adapters with ``timestep_rank`` need it; for others the hook does nothing. Attaching it twice
    changes nothing.

    Args:
        denoiser: called as ``denoiser(latents (B, ...), timestep, ...)``, where the timestep is a
            number, or a tensor of one, B or B/m elements (then the batch is m copies in a row, as
            in classifier-free guidance).
        num_train_timesteps: the timestep of pure noise, as in Stable Diffusion; denoisers in
            ``TIMESTEP_RANGES`` have their own.

    Returns:
        A handle whose ``remove()`` takes the hook off again.
    """
    handle = getattr(denoiser, _ATTRIBUTE, None)
    if isinstance(handle, RemovableHandle) and handle.id in (handle.hooks_dict_ref() or {}):
        return handle
    kind = type(getattr(denoiser, "_orig_mod", denoiser)).__name__  # as under torch.compile
    clean, noise = TIMESTEP_RANGES.get(kind, (0.0, num_train_timesteps))

    def push(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers = [layer for _, layer in iter_nora_layers(module) if has_timestep_law(layer)]
        if not layers:
            return
        latents = args[0] if args else next(kwargs[name] for name in _LATENTS if name in kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        progress = timestep_progress(timestep, latents, noise, clean)
        for layer in layers:
            layer.set_progress(progress)

    handle = denoiser.register_forward_pre_hook(push, with_kwargs=True)
    object.__setattr__(denoiser, _ATTRIBUTE, handle)  # no submodule, no state: a plain attribute
    return handle


def timestep_progress(
    timestep: Any, latents: Tensor | Sequence[Tensor], noise: float, clean: float = 0.0
) -> Tensor:
    """Noise level t/T of each sample, (B,) float32 in [0, 1], on the latents' device.

    Args:
        timestep: see ``attach_timestep_rank``.
        latents: (B, ...), or a list of B.
        noise: timestep of pure noise, T.
        clean: timestep of a picture.

    Raises:
        ValueError: when the number of timesteps does not divide the batch.
    """
    batch = len(latents)
    steps = torch.as_tensor(timestep, dtype=torch.float32, device=latents[0].device).reshape(-1)
    if batch % len(steps):
        raise ValueError(f"{len(steps)} timesteps for a batch of {batch}: give 1 or {batch}")
    progress = (steps - clean) / (noise - clean)
    return progress.clamp(0, 1).repeat(batch // len(steps))


def load_adapter(
    pipe_or_model: Any,
    path: str | Path,
    adapter_name: str = "default",
    weight: float = 1.0,
) -> int:
    """Load a NoRA or exported LoRA file into a pipeline or model, ready to sample.

    Args:
        pipe_or_model: a diffusers pipeline, or one of its models.
        path: native compact, native portable or LoRA ``.safetensors`` file, or a folder with one.
        adapter_name: name under which the adapter is added.
        weight: factor on its effect.

    Returns:
        Number of adapted modules.

    Raises:
        AdapterFileError: when the file is damaged, or does not fit this base.
    """
    modules = files.load_adapter(pipe_or_model, path, adapter_name=adapter_name, weight=weight)
    scheduler = getattr(pipe_or_model, "scheduler", None)
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
    for model in _denoisers(pipe_or_model):
        if any(has_timestep_law(layer) for _, layer in iter_nora_layers(model)):
            attach_timestep_rank(model, steps)
    return modules


def has_timestep_law(layer: NoraLayer) -> bool:
    """Whether any adapter on the layer has ``timestep_rank``."""
    return any(config.timestep_rank is not None for config in layer.nora_config.values())


def _denoisers(pipe_or_model: Any) -> list[nn.Module]:
    if isinstance(pipe_or_model, nn.Module):
        parameters = inspect.signature(pipe_or_model.forward).parameters
        return [pipe_or_model] if {"timestep", "t"} & parameters.keys() else []
    parts = (getattr(pipe_or_model, name, None) for name in ("unet", "transformer"))
    return [part for part in parts if isinstance(part, nn.Module)]
