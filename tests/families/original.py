"""Weights of a diffusers transformer under the names of its model's original code."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from nora_diffusion.adapter.original_keys import original_layer

_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SD3_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
_FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
    "attn.to_q": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    **_FLUX_NORMS,
}
_FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def original_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a transformer as its original code names it."""
    kind = type(model).__name__
    writers = {
        "SD3Transformer2DModel": _sd3,
        "FluxTransformer2DModel": _flux,
        "Flux2Transformer2DModel": _flux2,
        "ZImageTransformer2DModel": _z_image,
    }
    return {name: tensor.contiguous() for name, tensor in writers[kind](model).items()}


def fused_layers(state: dict[str, Tensor], transformer: str) -> dict[str, Tensor]:
    """The layers that an exported adapter can name, with the parts of each in their order."""
    found: dict[str, Tensor] = {}
    for name in state:
        module, _, kind = name.rpartition(".")
        try:
            layer, parts = original_layer(module, transformer)
        except ValueError:
            continue
        found[f"{layer}.{kind}"] = torch.cat([state[f"{part}.{kind}"] for part in parts])
    return found


def swapped(tensor: Tensor) -> Tensor:
    """Shift before scale, as the original code has the rows of a final modulation."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def _block(name: str) -> tuple[str, str, str, str]:
    """Kind of block, its number, the module in it and the parameter of a name."""
    match = re.fullmatch(r"(\w*transformer_blocks)\.(\d+)\.(.+)\.(\w+)", name)
    assert match, name
    kind, block, module, parameter = match.groups()
    return kind, block, module, parameter


def _sd3(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    found = fused_layers(state, "sd3")
    last = str(len(model.transformer_blocks) - 1)
    for name, tensor in state.items():
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = tensor
        elif name.startswith("norm_out.linear"):
            found[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = swapped(
                tensor
            )
        elif "norm1_context" in name:
            _, block, _, kind = _block(name)
            tensor = swapped(tensor) if block == last else tensor
            found[f"joint_blocks.{block}.context_block.adaLN_modulation.1.{kind}"] = tensor
        elif ".norm_" in name:
            _, block, module, kind = _block(name)
            found[f"joint_blocks.{block}.{_SD3_NORMS[module]}.{kind}"] = tensor
    return found


def _flux(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    found = fused_layers(state, "flux")
    for name, tensor in state.items():
        if name.startswith("norm_out.linear"):
            found[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = swapped(
                tensor
            )
        elif ".norm_" in name:
            kind, block, module, _ = _block(name)
            if kind == "transformer_blocks":
                found[f"double_blocks.{block}.{_FLUX_NORMS[module]}.scale"] = tensor
            else:
                found[f"single_blocks.{block}.{_FLUX2_SINGLE[module]}.scale"] = tensor
    return found


def _flux2(model: nn.Module) -> dict[str, Tensor]:
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if name == "norm_out.linear.weight":
            found["final_layer.adaLN_modulation.1.weight"] = swapped(tensor)
        elif "transformer_blocks" not in name:
            module, _, parameter = name.rpartition(".")
            found[f"{_FLUX2[module]}.{parameter}"] = tensor
        elif not re.search(r"to_[kv]\.|add_[kv]_proj", name):
            kind, block, module, parameter = _block(name)
            single = kind.startswith("single")
            inside = (_FLUX2_SINGLE if single else _FLUX2)[module]
            if inside.endswith("qkv"):
                parts = [name.replace("_q", f"_{letter}") for letter in "qkv"]
                tensor = torch.cat([state[part] for part in parts])
            if ".norm_" in name:
                parameter = "scale"
            found[f"{'single' if single else 'double'}_blocks.{block}.{inside}.{parameter}"] = (
                tensor
            )
    return found


def _z_image(model: nn.Module) -> dict[str, Tensor]:
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if re.search(r"attention\.to_[kv]\.", name):
            continue
        if "attention.to_q." in name:
            parts = [name.replace("to_q", f"to_{letter}") for letter in "qkv"]
            tensor = torch.cat([state[part] for part in parts])
        for ours, original in (
            ("all_final_layer.2-1.", "final_layer."),
            ("all_x_embedder.2-1.", "x_embedder."),
            (".attention.to_out.0.", ".attention.out."),
            (".attention.norm_k.", ".attention.k_norm."),
            (".attention.norm_q.", ".attention.q_norm."),
            (".attention.to_q.", ".attention.qkv."),
        ):
            name = name.replace(ours, original)
        found[name] = tensor
    return found
