"""Stage 3: the trained parts as a folder that plain `StableDiffusionPipeline` loads."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from transformers import CLIPTokenizer

from nora_diffusion.mini.denoiser import Joint, build_scheduler

PART_LIMIT = "14MB"  # of one weight file, so that parts travel everywhere


@torch.no_grad()
def set_latent_scale(autoencoder: AutoencoderTiny, images: torch.Tensor) -> float:
    """Sets the scaling factor that gives the latents of `images` (N, 3, H, W) unit variance."""
    deviation = float(autoencoder.encoder(images).float().std())
    autoencoder.register_to_config(scaling_factor=round(1 / deviation, 4))
    return deviation


def build_pipeline(
    autoencoder: AutoencoderTiny, model: Joint, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Puts the parts together on the CPU in float32."""
    # Its annotations ask for the very classes of SD 1.x; the code takes any of the kind.
    return cast(Any, StableDiffusionPipeline)(
        vae=autoencoder.cpu(),
        text_encoder=model.text_encoder.cpu(),
        tokenizer=tokenizer,
        unet=model.unet.cpu(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(
    pipeline: StableDiffusionPipeline, folder: Path, name: str, recipe: dict, manifests: Path
) -> str:
    """Writes the pipeline in fp16, ``mini.json`` (name, hash, recipe) and what it was shown.

    Returns:
        The hash of the weights.
    """
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=PART_LIMIT)
    # transformers loads in the dtype its config records, diffusers in float32: say float32 to both.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("*/config.json"):
        forget_origin(path)
    shutil.copytree(manifests, folder / "manifests", dirs_exist_ok=True)
    digest = weights_hash(folder)
    about = {"name": name, "hash": digest, "recipe": recipe}
    (folder / "mini.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return digest


def forget_origin(config_path: Path) -> None:
    """Takes out of a saved config.json where its model was loaded from: a path of this machine."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict):
            part.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def weights_hash(folder: Path) -> str:
    """SHA-256 over every weight file of a pipeline folder, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
