"""FSDP: each process keeps a part of the frozen denoiser, and gathers a block for its turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.config import UserError
from nora_diffusion.families.speed import repeated_blocks
from nora_diffusion.train import adapters


def shard_denoiser(denoiser: nn.Module, plugin: Any, device: torch.device) -> None:
    """Split the frozen weights over the processes, in place; the inner pairs stay whole.

    So what is trained is averaged, clipped, saved and resumed as without FSDP.

    Args:
        denoiser: frozen, with its adapter; on the CPU or on ``device``.
        plugin: the launcher's settings, from ``launcher.fsdp_settings``.
        device: where it computes.

    Raises:
        UserError: when the launcher names a class of blocks that the denoiser lacks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Channels-last weights cannot be dealt out by rows.
    denoiser = denoiser.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    inner = {
        pair[adapters.NAME]
        for _, layer in iter_nora_layers(denoiser)
        for pair in (layer.nora_inner_A, layer.nora_inner_B)
    }
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "ignored_params": inner,
    }
    for block in blocks(denoiser, plugin.transformer_cls_names_to_wrap):
        fully_shard(block, **settings)
    fully_shard(denoiser, **settings)


def blocks(denoiser: nn.Module, names: list[str] | None = None) -> list[nn.Module]:
    """The blocks that are gathered one at a time: of these classes, or those it repeats.

    Raises:
        UserError: when there is none of a class.
    """
    if not names:
        return repeated_blocks(denoiser)
    found = [module for module in denoiser.modules() if type(module).__name__ in names]
    missing = sorted(set(names) - {type(module).__name__ for module in found})
    if missing:
        known = sorted({type(module).__name__ for module in repeated_blocks(denoiser)})
        raise UserError(
            f"accelerate launch: fsdp_transformer_layer_cls_to_wrap = {', '.join(missing)}: the "
            f"denoiser has no such module; leave it out to split by {', '.join(known)}"
        )
    return found
