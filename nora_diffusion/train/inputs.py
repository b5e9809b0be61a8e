"""What a DreamBooth run trains on: photos, class images and prompts, encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nora_diffusion.adapter.factor_cache import cache_dir
from nora_diffusion.config import DreamboothConfig, fill_prompt
from nora_diffusion.data.cache import encode_items
from nora_diffusion.data.dataset import Dataset, Item, class_items, class_prompt, subject_views
from nora_diffusion.data.images import Photo, describe_skipped, read_photos
from nora_diffusion.families.base import Conditioning, Family, Framing
from nora_diffusion.sampling import GUIDANCE, STEPS, sample_prompts, save_png
from nora_diffusion.train.common import weights_digest
from nora_diffusion.train.report import Report

CLASS_SEED = 1_000_000
"""Seed of the first class image: apart from the seeds that validation pictures use."""


@dataclass(frozen=True)
class Inputs:
    """Everything a step needs besides the denoiser.

    Attributes:
        dataset: items and their order.
        photos: of the subject.
        latents: (I, C, h, w) float32, one for each item.
        weights: (I,) float32, on the loss of each item.
        framings: for each item how its picture is cut from the photo.
        prompts: P different prompts.
        prompt_rows: for each item the row of its prompt.
        conditioning: of the P prompts, by the base model.
        class_conditioning: of the class prompt alone, by the base model.
        scenes: of the prompts in ``sample.prompts``, by the base model.
        negative: of ``sample.negative_prompt``, by the base model.
        digest: of what is trained on, to notice a change before resuming.
    """

    dataset: Dataset
    photos: list[Photo]
    latents: Tensor
    weights: Tensor
    framings: tuple[Framing, ...]
    prompts: tuple[str, ...]
    prompt_rows: tuple[int, ...]
    conditioning: Conditioning
    class_conditioning: Conditioning
    scenes: Conditioning
    negative: Conditioning
    digest: str


def scene_prompts(cfg: DreamboothConfig) -> list[str]:
    """``sample.prompts`` with trigger and class filled in."""
    data = cfg.data
    return [fill_prompt(text, data.trigger, data.class_name) for text in cfg.sample.prompts]


def encode_inputs(cfg: DreamboothConfig, family: Family, report: Report) -> Inputs:
    """Read the photos, make class images where wanted, and encode pictures and prompts.

    To be called while the base model carries no adapter.

    Raises:
        UserError: when there is no usable photo.
    """
    data = cfg.data
    photos, skipped = read_photos(data.subject)
    if skipped:
        report.say(f"skipped in {data.subject}:\n{describe_skipped(skipped)}")
    views = subject_views(
        photos,
        trigger=data.trigger,
        class_name=data.class_name,
        captions=data.captions,
        flip=data.flip,
        crop=data.crop,
        seed=cfg.train.seed,
    )
    prior = []
    if cfg.train.prior == "class_images":
        prior = class_items(
            class_photos(cfg, family, report), data.class_name, cfg.train.prior_weight
        )
    dataset = Dataset(views, prior, cfg.train.seed)
    latents = _encode_pictures(cfg, family, dataset)
    prompts = tuple(dict.fromkeys(item.prompt for item in dataset.items))
    device = family.components.device
    side = cfg.data.resolution_px or family.resolution_px
    described = [(item.image_id, item.prompt, item.weight) for item in dataset.items]
    with family.components.placed(*family.components.text_encoders):
        encoded = [
            _encode_prompts(family, texts)
            for texts in (
                prompts,
                [class_prompt(data.class_name)],
                scene_prompts(cfg),
                [cfg.sample.negative_prompt],
            )
        ]
    return Inputs(
        dataset=dataset,
        photos=photos,
        latents=latents.to(device),
        weights=torch.tensor([item.weight for item in dataset.items], device=device),
        framings=tuple(framing(item, side) for item in dataset.items),
        prompts=prompts,
        prompt_rows=tuple(prompts.index(item.prompt) for item in dataset.items),
        conditioning=encoded[0],
        class_conditioning=encoded[1],
        scenes=encoded[2],
        negative=encoded[3],
        digest=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
    )


def framing(item: Item, resolution_px: int) -> Framing:
    """How the square of an item is cut from its photo, mirrored where the item is."""
    width, height = item.photo.size
    scale = resolution_px / min(width, height)
    x, y = item.place
    left = (1 - x if item.flip else x) * (width * scale - resolution_px)
    top = y * (height * scale - resolution_px)
    side = (resolution_px, resolution_px)
    return Framing((height, width), (round(top), round(left)), side)


def class_photos(cfg: DreamboothConfig, family: Family, report: Report) -> list[Photo]:
    """``train.prior_images`` pictures of the class; those that are missing are made by the base."""
    folder = _class_folder(cfg, family)
    folder.mkdir(parents=True, exist_ok=True)
    present = 0
    if any(folder.iterdir()):
        present = len(read_photos(folder, "data.class_images", limit=None)[0])
    missing = range(present, cfg.train.prior_images)
    if missing:
        report.say(f"making {len(missing)} class images in {folder}")
        parts = family.components
        with parts.placed(parts.denoiser_name, *parts.text_encoders, "vae"):
            _make_class_images(family, class_prompt(cfg.data.class_name), missing, folder)
    photos, _ = read_photos(folder, "data.class_images", limit=None)
    return photos[: cfg.train.prior_images]


def _make_class_images(family: Family, prompt: str, missing: Sequence[int], folder: Path) -> None:
    for start in range(0, len(missing), 16):
        seeds = [CLASS_SEED + index for index in missing[start : start + 16]]
        # With fixed settings: sample.* may change before a resume, these pictures must not.
        images = sample_prompts(family, [prompt], seeds)[0]
        for seed, image in zip(seeds, images, strict=True):
            origin = {"prompt": prompt, "seed": seed, "base": family.components.base}
            save_png(image, folder / f"class-{seed}.png", origin)


def _class_folder(cfg: DreamboothConfig, family: Family) -> Path:
    if cfg.data.class_images is not None:
        return Path(cfg.data.class_images).expanduser()
    cache = cache_dir()
    if cache is None or not cfg.data.cache:
        return Path(cfg.output.dir) / "class_images"
    spec = [
        weights_digest(family.components.denoiser),
        str(family.components.dtype),
        cfg.data.class_name,
        STEPS,
        GUIDANCE,
    ]
    name = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:24]
    return cache / "class-images" / name


def _encode_pictures(cfg: DreamboothConfig, family: Family, dataset: Dataset) -> Tensor:
    """(I, C, h, w) latents of all items, on the CPU."""
    cache = cache_dir() if cfg.data.cache else None
    with family.components.placed("vae"):
        latents = encode_items(
            dataset.items,
            family.encode_images,
            resolution_px=cfg.data.resolution_px or family.resolution_px,
            model=encoder_identity(family),
            folder=None if cache is None else cache / "latents",
        )
    return torch.stack([latents[item.image_id] for item in dataset.items])


def encoder_identity(family: Family) -> dict[str, str]:
    """What latents depend on besides picture and resolution: weights, settings, format, device."""
    vae: Any = family.components.pipeline.vae
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    return {
        "vae": weights_digest(vae),
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "dtype": str(vae.dtype),
        "device": family.components.device.type,
    }


@torch.no_grad()
def _encode_prompts(family: Family, prompts: Sequence[str]) -> Conditioning:
    # One at a time: in a batch the last bits would depend on the other prompts, and a resumed run
    # may have other sample.prompts.
    encoded = [family.encode_prompts([prompt]) for prompt in prompts]
    return Conditioning.cat(encoded)
