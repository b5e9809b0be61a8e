"""Stable Diffusion checkpoints in one .safetensors file, read without any download.

The file holds weights only; the model configs and the CLIP vocabulary come from this package.
Files with the transformer of another family are told apart here and read in `transformer_file`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from nora_diffusion.config import UserError
from nora_diffusion.families.transformer_file import transformer_family, transformer_name

ASSETS = Path(__file__).parent.parent / "assets"

_UNET = "model.diffusion_model."
_CONV_IN = _UNET + "input_blocks.0.0.weight"
_CLIP = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
_OPEN_CLIP = "cond_stage_model.model.token_embedding.weight"
_XL_CLIP = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
_XL_OPEN_CLIP = "conditioner.embedders.1.model.token_embedding.weight"
# Empty tensors by which some checkpoints say so.
_V_PREDICTION_MARK = "v_pred"
_ZERO_TERMINAL_MARK = "ztsnr"


def detect_family(path: Path) -> str:
    """Family of a checkpoint, from the names in its header.

    Raises:
        UserError: when it is damaged or of no text-to-image model that is known here.
    """
    name = config_name(path)
    return transformer_family(name) or ("sdxl" if name == "sdxl" else "sd")


def load_single_file(
    path: Path,
    *,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    **kwargs: Any,
) -> StableDiffusionPipeline:
    """Load a Stable Diffusion 1.x or 2.x checkpoint.

    Args:
        path: the file.
        config: folder of model configs in place of the shipped ones.
        prediction_type: "epsilon" or "v_prediction" for SD 2.x, whose file does not tell; None
            asks the weights (``predicts_velocity``).
        kwargs: for diffusers' ``from_single_file``.

    Raises:
        UserError: when the file is damaged or of another family.
    """
    name = config_name(path)
    folder = _config_folder(name, config)
    kwargs.setdefault("tokenizer", load_tokenizer(folder))
    pipe = StableDiffusionPipeline.from_single_file(
        str(path),
        config=str(folder),
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **kwargs,
    )
    if prediction_type is None and name == "sd21":
        marked = _V_PREDICTION_MARK in tensor_shapes(path)
        velocity = marked or predicts_velocity(pipe.unet)
        prediction_type = "v_prediction" if velocity else "epsilon"
        if not velocity and config is None:  # 2.x-base: 512 px, where the 768 px ones predict v
            pipe.unet.register_to_config(sample_size=64)
    if prediction_type is not None:
        pipe.scheduler.register_to_config(prediction_type=prediction_type)
    return pipe


def load_single_file_xl(
    path: Path,
    *,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    **kwargs: Any,
) -> StableDiffusionXLPipeline:
    """Load a Stable Diffusion XL checkpoint.

    Args:
        path: the file.
        config: folder of model configs in place of the shipped ones.
        prediction_type: "epsilon" or "v_prediction"; None: what the file says of itself by the mark
            that v-predicting checkpoints carry, else "epsilon".
        kwargs: for diffusers' ``from_single_file``.

    Raises:
        UserError: when the file is damaged or of another family.
    """
    folder = _config_folder(config_name(path), config)
    for part in ("tokenizer", "tokenizer_2"):
        kwargs.setdefault(part, load_tokenizer(folder, part))
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, add_watermarker=False,
        image_encoder=None, feature_extractor=None, **kwargs,
    )  # fmt: skip
    names = tensor_shapes(path)
    changes: dict[str, Any] = {}
    if prediction_type is not None or _V_PREDICTION_MARK in names:
        changes["prediction_type"] = prediction_type or "v_prediction"
    if _ZERO_TERMINAL_MARK in names:
        changes["rescale_betas_zero_snr"] = True
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def load_tokenizer(folder: Path, part: str = "tokenizer") -> CLIPTokenizer:
    """CLIP tokenizer of a model config folder, by default with the shipped vocabulary."""
    own = folder / part
    if (own / "tokenizer.json").is_file() or (own / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(str(own), local_files_only=True)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    vocabulary = ASSETS / "tokenizers" / "clip"
    return CLIPTokenizer(
        vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"), **settings
    )


@torch.no_grad()
def predicts_velocity(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet predicts v rather than ε, found by asking it about pure noise.

    At the last timestep the input is almost only noise. A noise predictor answers its own input
    (correlation near 1); v there is almost -x_0, which the input says little about.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.zeros(1, 77, unet.config["cross_attention_dim"])
    parameter = next(unet.parameters())
    answer = unet(
        noise.to(parameter), 999, encoder_hidden_states=context.to(parameter), return_dict=False
    )[0]
    both = torch.stack([noise.flatten(), answer.float().cpu().flatten()])
    return bool(torch.corrcoef(both)[0, 1] < 0.5)


def config_name(path: Path) -> str:
    """Folder under ``assets/configs`` for a checkpoint; see ``detect_family`` for the errors."""
    shapes = tensor_shapes(path)
    prefix = f'model.base = "{path}": '
    marks = {"sd15": (_CLIP,), "sd21": (_OPEN_CLIP,), "sdxl": (_XL_CLIP, _XL_OPEN_CLIP)}
    if (name := transformer_name(path, shapes)) is not None:
        return name
    found = [name for name, encoders in marks.items() if all(mark in shapes for mark in encoders)]
    if _CONV_IN not in shapes or not found:
        raise UserError(
            prefix + "this file is not a complete Stable Diffusion 1.x, 2.x or XL checkpoint (with "
            "UNet, text encoders and autoencoder; the refiner of XL is none), nor the transformer "
            "of SD 3, Flux.1, Flux.2 klein or Z-Image under its original names; other models load "
            "from a diffusers folder or a Hugging Face id"
        )
    channels = shapes[_CONV_IN][1]
    if channels != 4:
        raise UserError(
            prefix + f"its UNet takes {channels} channels, so it is an inpainting, depth or "
            "upscaling model; use a text-to-image model (4 channels)"
        )
    return found[0]


def _config_folder(name: str, given: str | Path | None) -> Path:
    return Path(given) if given is not None else ASSETS / "configs" / name


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a .safetensors file, from its header alone.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f'model.base = "{path}": not a readable .safetensors file ({error}); download it again'
        ) from error
