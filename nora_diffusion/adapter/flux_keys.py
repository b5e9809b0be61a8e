"""Flux.1 under the names of its original code, whose layers hold several of diffusers' in one.

There the projections to query, key and value (in single blocks the first feed-forward layer too)
are one matrix, their rows one below the other. LoRAs of such parts become one LoRA of the whole:
the down factors one below the other, the up factors as a block-diagonal matrix, so the rank is the
sum of theirs (3 times for query, key and value) and the product stays exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
# Without the modulation of the final layer: the two codes order its rows differently.
_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_BLOCKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE_BLOCK),
    "single_transformer_blocks": ("single_blocks", _SINGLE_BLOCK),
}
_IN_BLOCK = re.compile(r"(?P<kind>(?:single_)?transformer_blocks)\.(?P<block>\d+)\.(?P<rest>.+)")


def original_layer(module: str) -> tuple[str, tuple[str, ...]]:
    """Layer of the original code that a diffusers module is (in), and all modules in it, in order.

    Raises:
        ValueError: no such module in that code.
    """
    match = _IN_BLOCK.fullmatch(module)
    if match is None:
        prefix, inside, rest, table = "", "", module, _OUTSIDE
    else:
        kind, table = _BLOCKS[match["kind"]]
        prefix, rest = f"{kind}.{match['block']}.", match["rest"]
        inside = module.removesuffix(rest)
    for layer, parts in table.items():
        if rest in parts:
            return prefix + layer, tuple(inside + part for part in parts)
    raise ValueError(
        f"layout 'kohya' has no name for {module!r}, a module of Flux.1; use layout='diffusers', "
        "or train without it"
    )


def fuse(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA pairs by layer of the original code, from pairs by diffusers module.

    Args:
        pairs: ``(lora_A (rank, in), lora_B (out, rank))`` by module.
        rows: output features of every module, those without a pair too.

    Raises:
        ValueError: a module has no place in the original code.
    """
    layers = dict(original_layer(module) for module in pairs)
    fused: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, parts in layers.items():
        downs = [pairs[part][0] for part in parts if part in pairs]
        down, column = torch.cat(downs), 0
        up = down.new_zeros(sum(rows[part] for part in parts), down.shape[0])
        for part, block in zip(parts, _row_blocks(up, parts, rows), strict=True):
            if part in pairs:
                rank = pairs[part][1].shape[1]
                block[:, column : column + rank] = pairs[part][1]
                column += rank
        fused[layer] = down, up
    return fused


def split(
    layer_pair: tuple[Tensor, Tensor], parts: Sequence[str], rows: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inverse of ``fuse`` for one layer: exact LoRA pairs by diffusers module.

    Ranks that do not reach a part are left out of it, and so are parts that none reaches. If none
    reaches any part (an untrained adapter), each gets all of them.
    """
    down, up = layer_pair
    blocks = dict(zip(parts, _row_blocks(up, parts, rows), strict=True))
    reached = {part: (block != 0).any(dim=0) for part, block in blocks.items()}
    if not bool(up.any()):
        return {part: (down, block.contiguous()) for part, block in blocks.items()}
    return {
        part: (down[ranks].contiguous(), blocks[part][:, ranks].contiguous())
        for part, ranks in reached.items()
        if bool(ranks.any())
    }


def _row_blocks(up: Tensor, parts: Iterable[str], rows: Mapping[str, int]) -> tuple[Tensor, ...]:
    return up.split([rows[part] for part in parts])
