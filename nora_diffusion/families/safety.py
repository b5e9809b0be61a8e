"""The safety checker that some base models come with: keeping it, and asking it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from nora_diffusion.config import UserError
from nora_diffusion.families import locate
from nora_diffusion.families.base import Family
from nora_diffusion.families.quiet import quiet_loading

_PART, _READER = "safety_checker", "feature_extractor"


def attach_safety_checker(family: Family) -> bool:
    """Load the base's safety checker into its pipeline, where the base has one.

    ``load_family`` leaves it out, as training has no use for it. Single files have none.

    Returns:
        Whether there is one.

    Raises:
        UserError: when there is one that cannot be used.
    """
    parts = family.components
    source = locate(parts.base)
    if isinstance(source, Path) and source.is_file():
        return False
    index = cast(dict[str, Any], DiffusionPipeline.load_config(str(source)))
    name = (index.get(_PART) or (None, None))[1]
    if name is None:
        return False
    problem = f'model.base = "{parts.base}": its safety checker '
    if name != "StableDiffusionSafetyChecker":
        raise UserError(f"{problem}is a {name}, which is not known here; use another base")
    try:
        with quiet_loading():
            checker, reader = _load(str(source))
    except OSError as error:
        raise UserError(f"{problem}cannot be loaded ({str(error).splitlines()[0]})") from error
    checker = checker.requires_grad_(False).eval().to(parts.device)
    parts.pipeline.register_modules(**{_PART: checker, _READER: reader})
    return True


def _load(source: str) -> tuple[Any, Any]:
    # Imported where transformers' remarks on this are kept quiet.
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    kind: Any = StableDiffusionSafetyChecker
    checker = kind.from_pretrained(source, subfolder=_PART, use_safetensors=True)
    return checker, CLIPImageProcessor.from_pretrained(source, subfolder=_READER)


@torch.no_grad()
def screened(family: Family, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images, black in place of those that the pipeline's safety checker objects to.

    As in diffusers, with a warning that says how many; without a checker the images themselves.
    """
    pipe = family.components.pipeline
    checker = getattr(pipe, _PART, None)
    if checker is None:
        return list(images)
    pixels = pipe.feature_extractor(list(images), return_tensors="pt").pixel_values
    # Of the pictures it is given it blackens those it objects to; only its answers are used.
    blank = np.zeros((len(images), 1, 1, 3))
    _, flags = checker(images=blank, clip_input=pixels.to(checker.device, checker.dtype))
    if any(flags):
        warnings.warn(
            f"the base's safety checker replaced {sum(map(bool, flags))} of {len(images)} pictures "
            "by black ones; try another prompt or seed",
            stacklevel=2,
        )
    return [
        Image.new("RGB", image.size) if flag else image
        for image, flag in zip(images, flags, strict=True)
    ]
