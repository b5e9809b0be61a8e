"""Flux.1 and SD 3 under the names of their original code, whose layers hold several of diffusers'.

There the projections to query, key and value (in Flux.1's single blocks the first feed-forward
layer too) are one matrix, their rows one below the other. LoRAs of such parts become one LoRA of
the whole: the down factors one below the other, the up factors as a block-diagonal matrix, so the
rank is the sum of theirs (3 times for query, key and value) and the product stays exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, tuple[str, ...]]
"""Layer of the original code to the diffusers modules in it, in the order of their rows."""


@dataclass(frozen=True)
class Original:
    """Names of a transformer's original code.

    Attributes:
        title: name of the model, for messages.
        blocks: name of a list of blocks in diffusers to its name there and the layers in a block.
        outside: layers that are in no block.
    """

    title: str
    blocks: Mapping[str, tuple[str, Parts]]
    outside: Parts


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
_FLUX_OUTSIDE = {
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
_JOINT_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
# Without the modulation of the final layer and (of SD 3) of the context, whose last one is such a
# layer: the two codes order its rows differently.
ORIGINALS = {
    "flux": Original(
        "Flux.1",
        {
            "transformer_blocks": ("double_blocks", _DOUBLE_BLOCK),
            "single_transformer_blocks": ("single_blocks", _SINGLE_BLOCK),
        },
        _FLUX_OUTSIDE,
    ),
    "sd3": Original(
        "SD 3",
        {"transformer_blocks": ("joint_blocks", _JOINT_BLOCK)},
        {
            "x_embedder.proj": ("pos_embed.proj",),
            "context_embedder": ("context_embedder",),
            "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
            "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
            "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
            "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
            "final_layer.linear": ("proj_out",),
        },
    ),
}
"""By the name that a `keys.Dialect` has for the transformer."""
_IN_BLOCK = re.compile(r"(?P<kind>(?:single_)?transformer_blocks)\.(?P<block>\d+)\.(?P<rest>.+)")


def original_layer(module: str, transformer: str) -> tuple[str, tuple[str, ...]]:
    """Layer of the original code that a diffusers module is (in), and all modules in it, in order.

    Args:
        module: its path in the transformer.
        transformer: key of ``ORIGINALS``.

    Raises:
        ValueError: no such module in that code.
    """
    original = ORIGINALS[transformer]
    match = _IN_BLOCK.fullmatch(module)
    if match is not None and match["kind"] in original.blocks:
        kind, table = original.blocks[match["kind"]]
        prefix, rest = f"{kind}.{match['block']}.", match["rest"]
        inside = module.removesuffix(rest)
    else:
        prefix, inside, rest, table = "", "", module, original.outside
    for layer, parts in table.items():
        if rest in parts:
            return prefix + layer, tuple(inside + part for part in parts)
    raise ValueError(
        f"layout 'kohya' has no name for {module!r}, a module of {original.title}; use "
        "layout='diffusers', or train without it"
    )


def fuse(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, int], transformer: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA pairs by layer of the original code, from pairs by diffusers module.

    Args:
        pairs: ``(lora_A (rank, in), lora_B (out, rank))`` by module.
        rows: output features of every linear module, those without a pair too.
        transformer: key of ``ORIGINALS``.

    Raises:
        ValueError: a module has no place in the original code.
    """
    layers = dict(original_layer(module, transformer) for module in pairs)
    fused: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, parts in layers.items():
        if len(parts) == 1:  # a convolution may be one
            fused[layer] = pairs[parts[0]]
            continue
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
