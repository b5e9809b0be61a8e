"""Weights of a diffusers pipeline under the names of the original Stable Diffusion code."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def ldm_checkpoint(pipe: Any) -> dict[str, Tensor]:
    """State of UNet, autoencoder and text encoder, as in a single-file checkpoint."""
    layers = pipe.unet.config.layers_per_block
    attention = [kind.startswith("CrossAttn") for kind in pipe.unet.config.up_block_types]
    checkpoint = {
        f"model.diffusion_model.{unet_key(name, layers, attention)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    blocks = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        key = vae_key(name, blocks)
        if ".attn_1." in key and key.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        checkpoint[f"first_stage_model.{key}"] = value
    if hasattr(pipe, "text_encoder_2"):
        checkpoint |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        return checkpoint | open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    if pipe.unet.config.use_linear_projection:
        return checkpoint | open_clip(pipe.text_encoder, "cond_stage_model.model.")
    return checkpoint | clip(pipe.text_encoder, "cond_stage_model.transformer.")


def clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value
        for name, value in encoder.state_dict().items()
    }


def unet_key(name: str, layers: int, up_attention: list[bool]) -> str:
    module, _, kind = name.rpartition(".")
    if module in UNET_FIXED:
        return f"{UNET_FIXED[module]}.{kind}"
    match = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    assert match, name
    side, block, part, layer, rest = match.groups()
    first, layer = int(block or 0) * (layers + 1), int(layer)
    if part == "resnets":
        rest = re.sub(r"^\w+", lambda m: RESNET[m[0]], rest)
    inner = int(part == "attentions")
    if side == "mid":
        return f"middle_block.{1 if inner else 2 * layer}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + up_attention[int(block)]}.{rest}"
    if side == "down":
        return f"input_blocks.{first + layer + 1}.{inner}.{rest}"
    return f"output_blocks.{first + layer}.{inner}.{rest}"


def vae_key(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, tail = name.split("mid_block.attentions.0.")
        module, _, kind = tail.rpartition(".")
        return f"{head}mid.attn_1.{VAE_ATTENTION[module]}.{kind}"
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    up = r"up_blocks\.(\d)\.(resnets|upsamplers\.0)"
    parts = {"resnets": "block", "upsamplers.0": "upsample"}
    return re.sub(up, lambda m: f"up.{blocks - 1 - int(m[1])}.{parts[m[2]]}", name)


def open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = {
        name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()
    }
    renamed: dict[str, Tensor] = {}
    if (projection := state.pop("text_projection.weight", None)) is not None:
        renamed["text_projection"] = projection.T
    for name, value in state.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            joined = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            key = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            renamed[key] = torch.cat(joined)
        elif "k_proj" in name or "v_proj" in name:
            continue
        else:
            for old, new in (
                ("embeddings.position_embedding.weight", "positional_embedding"),
                ("embeddings.token_embedding", "token_embedding"),
                ("final_layer_norm", "ln_final"),
                ("encoder.layers", "transformer.resblocks"),
                ("self_attn", "attn"),
                ("layer_norm", "ln_"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                name = name.replace(old, new)
            renamed[name] = value
    return {f"{prefix}{name}": value for name, value in renamed.items()}
