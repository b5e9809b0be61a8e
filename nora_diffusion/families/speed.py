"""Faster kernels for a denoiser: attention by xformers, and compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_HAVE_XFORMERS = {"AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0"}
"""Attention classes of diffusers that its xformers ones compute the same as."""

RECOMPILE_LIMIT = 64
"""Graphs of one block's code: its widths and sizes, training and sampling, with and without the
adapter. At torch's own limit of 8 it silently goes back to eager."""


def use_attention(denoiser: Any, kind: str, say: Callable[[str], None]) -> str:
    """Choose the attention kernels; returns the kind that is used.

    Args:
        denoiser: a model of diffusers.
        kind: "sdpa", PyTorch's own, which diffusers uses by itself, or "xformers".
        say: is told where xformers cannot be had, and PyTorch's own is used instead.
    """
    if kind == "sdpa":
        return kind
    found = [getattr(module, "processor", None) for module in denoiser.modules()]
    processors = [processor for processor in found if processor is not None]
    try:
        if any(hasattr(processor, "_attention_backend") for processor in processors):
            denoiser.set_attention_backend(kind)
        else:  # older attention classes of diffusers: UNets, SD 3, PixArt
            # diffusers replaces whatever it finds, Sana's linear attention too, by softmax.
            others = {type(processor).__name__ for processor in processors} - _HAVE_XFORMERS
            if others:
                raise ValueError(f"there is none of the kind of {', '.join(sorted(others))}")
            denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        say(f'model.attention = "xformers" cannot be used here ({reason}); using PyTorch\'s own')
        return "sdpa"
    return kind


def compile_blocks(denoiser: Any, backend: str = "inductor") -> int:
    """Compile the blocks that a denoiser repeats, each kind once; returns how many there are.

    Regional compilation: a fraction of the time that the whole model takes, for nearly its speed.
    Shapes stay fixed in each graph, so that which graph a batch runs through does not depend on
    what ran before, and a resumed run does to the bit what an uninterrupted one does.
    """
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    blocks = repeated_blocks(denoiser)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks diffusers names as repeated, or else those in its lists of transformer blocks."""
    named = getattr(denoiser, "_repeated_blocks", None)
    if named:
        return [m for m in denoiser.modules() if type(m).__name__ in named]
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList)]
    kinds = {type(m) for blocks in lists for m in blocks if "Block" in type(m).__name__}
    return [m for m in denoiser.modules() if type(m) in kinds]
