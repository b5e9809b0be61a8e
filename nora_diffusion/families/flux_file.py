"""Flux.1 transformers in one .safetensors file of the original layout.

Such a file has no text encoders and no autoencoder; they come from a diffusers pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from nora_diffusion.config import UserError
from nora_diffusion.families import ASSETS
from nora_diffusion.families.loading import pretrained
from nora_diffusion.families.single_file import config_name

PUBLIC = {
    "flux_dev": "black-forest-labs/FLUX.1-dev",
    "flux_schnell": "black-forest-labs/FLUX.1-schnell",
}
"""Hub id of the other parts, by the name of the shipped configs."""


def load_flux_file(path: Path, *, parts: str | Path | None = None, **kwargs: Any) -> Any:
    """The pipeline around the transformer of a file, on the CPU.

    Args:
        path: the file.
        parts: diffusers folder or hub id that the text encoders and the autoencoder are taken from.
            Left out, it is the folder that the file lies in if that is a diffusers pipeline, else
            the public model on the hub.
        kwargs: for diffusers' ``from_pretrained``.

    Raises:
        UserError: when the other parts are not to be had.
    """
    name = config_name(path)
    configs = ASSETS / "configs" / name
    beside = path.parent if (path.parent / "model_index.json").is_file() else None
    source = parts or beside or PUBLIC[name]
    dtype = kwargs.get("dtype", torch.float32)
    transformer = FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(configs),
        subfolder="transformer",
        dtype=dtype.get("default", torch.float32) if isinstance(dtype, dict) else dtype,
        local_files_only=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(configs / "scheduler"))
    try:
        return pretrained(source, transformer=transformer, scheduler=scheduler, **kwargs)
    except OSError as error:
        raise UserError(
            f'model.base = "{path}": this file holds the transformer of Flux.1 alone; text '
            f"encoders and autoencoder are not in {source} ({str(error).splitlines()[0]}). Put the "
            "file into the diffusers folder of a Flux.1 model, or allow the download"
        ) from error
