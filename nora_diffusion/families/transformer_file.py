"""One .safetensors file with a transformer in its original layout: SD 3, Flux.1 and 2, Z-Image.

Such a file is read for its transformer; text encoders and autoencoder come from a diffusers
pipeline: the folder that the file lies in, or the public model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from nora_diffusion.config import UserError
from nora_diffusion.families import ASSETS
from nora_diffusion.families.loading import pretrained

PUBLIC = {
    "flux_dev": "black-forest-labs/FLUX.1-dev",
    "flux_schnell": "black-forest-labs/FLUX.1-schnell",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35_medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35_large": "stabilityai/stable-diffusion-3.5-large",
    "flux2_klein_base_4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "z_image": "Tongyi-MAI/Z-Image",
}
"""Hub id of the other parts, by the name of the shipped configs."""

_FAMILIES = {
    "flux_dev": "flux",
    "flux_schnell": "flux",
    "sd3": "sd3",
    "sd35_medium": "sd3",
    "sd35_large": "sd3",
    "flux2_klein_base_4b": "flux2_klein",
    "z_image": "z_image",
}
_CLASSES = {
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "flux2_klein": "Flux2Transformer2DModel",
    "z_image": "ZImageTransformer2DModel",
}
_PREFIX = "model.diffusion_model."
_MARKS = {
    "flux": ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"),
    "flux2_klein": ("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
    "z_image": ("layers.0.attention.qkv.weight", "cap_embedder.1.weight"),
}
# Of the layer that reads the latents: models for filling in or control read more of them.
_INPUTS = {
    "flux": ("img_in.weight", 64),
    "sd3": ("x_embedder.proj.weight", 16),
}


def transformer_family(name: str) -> str | None:
    """Family of the transformer with shipped configs of this name; None: not one of these."""
    return _FAMILIES.get(name)


def transformer_name(path: Path, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Name of the shipped configs for a file's transformer, or None if it holds no such one.

    Args:
        path: of the file, for messages.
        shapes: of its tensors.

    Raises:
        UserError: when its transformer is no text-to-image one, or is scaled 8-bit numbers.
    """
    known = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
    families = [name for name, marks in _MARKS.items() if all(mark in known for mark in marks)]
    if not families:
        return None
    (family,) = families
    scales = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale")
    if any(name.endswith(scales) for name in known):
        raise UserError(
            f'model.base = "{path}": its weights are 8-bit numbers with scales of their own, which '
            "are not read here; use the 16-bit file of the same model"
        )
    layer, channels = _INPUTS.get(family, ("", 0))
    if layer and known[layer][1] != channels:
        raise UserError(
            f'model.base = "{path}": its transformer takes {known[layer][1]} channels instead of '
            f"{channels}, so it is for inpainting or control; use a text-to-image model"
        )
    return _variant(family, known)


def _variant(family: str, names: Collection[str]) -> str:
    if family == "flux":
        return "flux_dev" if "guidance_in.in_layer.weight" in names else "flux_schnell"
    if family == "sd3":
        if "joint_blocks.0.x_block.attn2.qkv.weight" in names:
            return "sd35_medium"
        large = "joint_blocks.37.x_block.attn.qkv.weight" in names
        return "sd35_large" if large else "sd3"
    return {"flux2_klein": "flux2_klein_base_4b", "z_image": "z_image"}[family]


def load_transformer_file(path: Path, *, parts: str | Path | None = None, **kwargs: Any) -> Any:
    """The pipeline around the transformer of a file, on the CPU.

    Args:
        path: the file.
        parts: diffusers folder or hub id that the text encoders and the autoencoder are taken from.
            Left out, it is the folder that the file lies in if that is a diffusers pipeline, else
            the public model on the hub. Its scheduler counts too, but for Flux.1, where the file
            tells dev from schnell.
        kwargs: for diffusers' ``from_pretrained``.

    Raises:
        UserError: when the other parts are not to be had, or the transformer has another size.
    """
    from nora_diffusion.families.single_file import config_name

    name = config_name(path)
    family = _FAMILIES[name]
    beside = path.parent if (path.parent / "model_index.json").is_file() else None
    source = parts or beside or PUBLIC[name]
    own = Path(source) / "transformer" / "config.json"
    configs = Path(source) if own.is_file() else ASSETS / "configs" / name
    dtype = kwargs.get("dtype", torch.float32)
    try:
        transformer = getattr(diffusers, _CLASSES[family]).from_single_file(
            str(path),
            config=str(configs),
            subfolder="transformer",
            dtype=dtype.get("default", torch.float32) if isinstance(dtype, dict) else dtype,
            local_files_only=True,
        )
    except (ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        raise UserError(
            f'model.base = "{path}": its transformer does not fit the sizes in {configs} '
            f"({str(error).splitlines()[0]}). Put the file into the diffusers folder of the model "
            "it is a version of"
        ) from error
    if family == "flux":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler
        kwargs["scheduler"] = scheduler.from_pretrained(
            str(ASSETS / "configs" / name / "scheduler")
        )
    try:
        return pretrained(source, transformer=transformer, **kwargs)
    except OSError as error:
        raise UserError(
            f'model.base = "{path}": this file is read for its transformer alone; text encoders '
            f"and autoencoder are not in {source} ({str(error).splitlines()[0]}). Put the file "
            "into the diffusers folder of the model, or allow the download"
        ) from error
