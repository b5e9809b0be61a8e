"""What a DreamBooth run trains on: photos, class images and prompts, encoded once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nora_diffusion.adapter.factor_cache import cache_dir
from nora_diffusion.config import DreamboothConfig
from nora_diffusion.data.cache import encode_items
from nora_diffusion.data.dataset import Dataset, Item, class_items, class_prompt, dropped
from nora_diffusion.data.images import Photo, square
from nora_diffusion.data.masks import latent_weights
from nora_diffusion.families.base import Conditioning, Family, Framing
from nora_diffusion.families.objective import rows_of
from nora_diffusion.train.class_images import class_photos, subject_of_each_class
from nora_diffusion.train.common import weights_digest
from nora_diffusion.train.photos import (
    all_photos,
    buckets_of,
    check_masks,
    lay_out,
    read_subjects,
    report_lines,
    scene_prompts,
)
from nora_diffusion.train.report import Report

SQUARE_PX = 256
"""Most that a tile of ``before_after.png`` shows."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass is given.

    Attributes:
        latents: (B, C, h, w) float32.
        weights: (B,) float32, on the loss of each item.
        framings: of the B items.
        prompt_rows: of ``Inputs.prompts``, after dropout.
        class_rows: of ``Inputs.class_prompts``.
        mask: (B, 1, h, w) weights of each place, or None.
    """

    latents: Tensor
    weights: Tensor
    framings: tuple[Framing, ...]
    prompt_rows: tuple[int, ...]
    class_rows: tuple[int, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """Everything a step needs besides the denoiser.

    Attributes:
        dataset: items and their order.
        photos: of all subjects.
        latents: (I, C, h, w) float32, one for each item; a tuple of (C, h, w) where sizes differ.
        weights: (I,) float32, on the loss of each item.
        masks: for each item (1, h, w) weights of its places; None: all count fully.
        framings: for each item how its picture is cut from the photo.
        prompts: P different prompts.
        prompt_rows: for each item the rows of its prompt, of the prompt without the trigger, and
            of the empty prompt; the same row thrice where nothing is dropped.
        conditioning: of the P prompts, by the base model.
        class_prompts: Q different prompts of classes.
        class_rows: for each item the row of its class.
        class_conditioning: of the Q prompts of classes, by the base model.
        scenes: of the prompts in ``sample.prompts``, by the base model.
        negative: of ``sample.negative_prompt``, by the base model.
        squares: the photos, small, for ``before_after.png``: their files may be gone by then.
        digest: of what is trained on, to notice a change before resuming.
        dropout: shares of captions and of triggers dropped.
    """

    dataset: Dataset
    photos: list[Photo]
    latents: Tensor | tuple[Tensor, ...]
    weights: Tensor
    masks: tuple[Tensor, ...] | None
    framings: tuple[Framing, ...]
    prompts: tuple[str, ...]
    prompt_rows: tuple[tuple[int, int, int], ...]
    conditioning: Conditioning
    class_prompts: tuple[str, ...]
    class_rows: tuple[int, ...]
    class_conditioning: Conditioning
    scenes: Conditioning
    negative: Conditioning
    squares: tuple[Image.Image, ...]
    digest: str
    dropout: tuple[float, float] = (0.0, 0.0)

    def photo_table(self) -> list[list[str]]:
        """File name, digest and prompt of each photo, to tell what has changed since."""
        found = {item.photo.path: item for item in self.dataset.items}
        return [[path.name, item.photo.digest, item.prompt] for path, item in found.items()]

    def batch(self, number: int, size: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """Batch ``number`` of the run, a function of the number and the seed alone.

        Args:
            number: from 0.
            size: items in it.
            part: (k, n), the k-th part, from 0, of a batch of n times that size.
        """
        own, whole = rows_of(part, size), part[1] * size
        indices = self.dataset.batch_of_one_size(number, whole)[own]
        draws = list(zip(*dropped(self.dataset.seed, number, whole), strict=True))[own]
        rows = (self.prompt_rows[index] for index in indices)
        return Batch(
            latents=torch.stack([self.latents[index] for index in indices]),
            weights=self.weights[indices],
            framings=tuple(self.framings[index] for index in indices),
            prompt_rows=tuple(map(self._row, rows, draws)),
            class_rows=tuple(self.class_rows[index] for index in indices),
            mask=None if self.masks is None else torch.stack([self.masks[i] for i in indices]),
        )

    def to(self, device: torch.device | str) -> Inputs:
        """The same with all tensors on a device."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device)
            for name in ("weights", "conditioning", "class_conditioning", "scenes", "negative")
        }
        moved["latents"] = _moved(self.latents, device)
        moved["masks"] = None if self.masks is None else _moved(self.masks, device)
        return dataclasses.replace(self, **moved)

    def _row(self, rows: tuple[int, int, int], draws: tuple[float, float]) -> int:
        if draws[0] < self.dropout[0]:
            return rows[2]
        return rows[1] if draws[1] < self.dropout[1] else rows[0]


def encode_inputs(cfg: DreamboothConfig, family: Family, report: Report) -> Inputs:
    """Read the photos, make class images where wanted, and encode pictures and prompts.

    To be called while the base model carries no adapter. All tensors are on the CPU.

    Raises:
        UserError: when there is no usable photo.
    """
    found = read_subjects(cfg)
    check_masks(cfg, found)
    side = cfg.data.resolution_px or family.resolution_px
    told = "\n".join(report_lines(cfg, found, (side, family.size_multiple_px)))
    report.say(told)
    report.event("data", message=told)
    buckets = buckets_of(cfg, side, family.size_multiple_px)
    views, repeats = lay_out(cfg, found, buckets)
    prior = []
    if cfg.train.prior == "class_images":
        for number, one in enumerate(subject_of_each_class(cfg)):
            photos = class_photos(cfg, family, report, one, number)
            prior += class_items(photos, one.class_name, cfg.train.prior_weight, buckets)
    dataset = Dataset(views, prior, cfg.train.seed, repeats)
    items = dataset.items
    latents = _encode_pictures(cfg, family, dataset)
    masks = _weigh_places(cfg, items, latents, side)
    prompts, rows = _prompt_table(cfg, items)
    class_prompts = tuple(dict.fromkeys(class_prompt(one.class_name) for one in cfg.data.each()))
    with family.components.placed(*family.components.text_encoders):
        texts = (prompts, class_prompts, scene_prompts(cfg))
        of_prompts, of_classes, of_scenes = (_encode_prompts(family, part) for part in texts)
        negative = _encode_prompts(family, [cfg.sample.negative_prompt], negative=True)
    return Inputs(
        dataset=dataset,
        photos=all_photos(found),
        latents=_together(latents),
        weights=torch.tensor([item.weight for item in items]),
        masks=None if masks is None else tuple(masks),
        framings=tuple(framing(item, side) for item in items),
        prompts=prompts,
        prompt_rows=rows,
        conditioning=of_prompts,
        class_prompts=class_prompts,
        class_rows=tuple(class_prompts.index(class_prompt(item.class_name)) for item in items),
        class_conditioning=of_classes,
        scenes=of_scenes,
        negative=negative,
        squares=tuple(square(photo.open(), min(side, SQUARE_PX)) for photo in all_photos(found)),
        digest=_digest(items, masks),
        dropout=(cfg.data.caption_dropout, cfg.data.trigger_dropout),
    ).to("cpu")


def _prompt_table(
    cfg: DreamboothConfig, items: Sequence[Item]
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """The different prompts, and for each item its rows; see ``Inputs.prompt_rows``.

    Class images keep their prompt: they are there to hold what it means.
    """

    def texts(item: Item) -> tuple[str, str, str]:
        own = item.prompt
        if item.prior:
            return own, own, own
        bare = item.prompt_without_trigger if cfg.data.trigger_dropout else own
        return own, bare, "" if cfg.data.caption_dropout else own

    table = [texts(item) for item in items]
    # The prompts themselves first: their rows are then those of a run without dropout.
    prompts = tuple(dict.fromkeys(row[kind] for kind in range(3) for row in table))
    places = {prompt: row for row, prompt in enumerate(prompts)}
    return prompts, tuple((places[a], places[b], places[c]) for a, b, c in table)


def _weigh_places(
    cfg: DreamboothConfig, items: Sequence[Item], latents: Sequence[Tensor], side: int
) -> list[Tensor] | None:
    """(1, h, w) weights of the places of each item; None without ``data.masks``."""
    if not cfg.data.masks:
        return None
    weights: list[Tensor] = []
    for item, latent in zip(items, latents, strict=True):
        size = (int(latent.shape[-2]), int(latent.shape[-1]))
        mask = None if item.prior else item.mask(side)
        background = cfg.data.mask_background
        whole = torch.ones(1, *size)
        weights.append(whole if mask is None else latent_weights(mask, size, background))
    return weights


def _digest(items: Sequence[Item], masks: Sequence[Tensor] | None) -> str:
    described: list[object] = [(item.image_id, item.prompt, item.weight) for item in items]
    if masks is not None:
        described += [hashlib.sha256(mask.numpy().tobytes()).hexdigest() for mask in masks]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _moved(tensors: Any, device: torch.device | str) -> Any:
    """One tensor, or a tuple of them, on a device."""
    if isinstance(tensors, Tensor):
        return tensors.to(device)
    return tuple(tensor.to(device) for tensor in tensors)


def _together(latents: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One tensor where all have one shape."""
    same = len({latent.shape for latent in latents}) == 1
    return torch.stack(latents) if same else tuple(latents)


def framing(item: Item, resolution_px: int) -> Framing:
    """How the picture of an item is cut from its photo, mirrored where the item is."""
    width, height = item.photo.size
    to_width, to_height = item.size(resolution_px)
    scale = max(to_width / width, to_height / height)
    x, y = item.place
    left = (1 - x if item.flip else x) * (width * scale - to_width)
    top = y * (height * scale - to_height)
    return Framing((height, width), (round(top), round(left)), (to_height, to_width))


def _encode_pictures(cfg: DreamboothConfig, family: Family, dataset: Dataset) -> list[Tensor]:
    """(C, h, w) latents of each item, on the CPU."""
    with family.components.placed("vae"):
        latents = encode_items(
            dataset.items,
            family.encode_images,
            resolution_px=cfg.data.resolution_px or family.resolution_px,
            model=encoder_identity(family),
            folder=_latents_folder() if cfg.data.cache else None,
        )
    return [latents[item.image_id] for item in dataset.items]


def _latents_folder() -> Path | None:
    """Where encoded pictures are kept: ``NORA_LATENTS_DIR``, else in the cache; None: nowhere."""
    chosen = os.environ.get("NORA_LATENTS_DIR")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    cache = cache_dir()
    return None if cache is None else cache / "latents"


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
def _encode_prompts(family: Family, prompts: Sequence[str], negative: bool = False) -> Conditioning:
    # One at a time: in a batch the last bits would depend on the other prompts, and a resumed run
    # may have other sample.prompts.
    encoded = [family.encode_prompts([prompt], negative) for prompt in prompts]
    return Conditioning.cat(encoded)
