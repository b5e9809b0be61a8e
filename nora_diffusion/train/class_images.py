"""The pictures of a class that ``train.prior = "class_images"`` trains on beside the subject."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from nora_diffusion.adapter.factor_cache import cache_dir
from nora_diffusion.config import DreamboothConfig, SubjectFolder
from nora_diffusion.data.dataset import class_prompt
from nora_diffusion.data.images import Photo, read_photos
from nora_diffusion.families.base import Family
from nora_diffusion.sampling import GUIDANCE, STEPS, sample_prompts, save_png
from nora_diffusion.train.common import weights_digest
from nora_diffusion.train.report import Report

CLASS_SEED = 1_000_000
"""Seed of the first class image: apart from the seeds that validation pictures use."""


def subject_of_each_class(cfg: DreamboothConfig) -> list[SubjectFolder]:
    """For each class, and each folder of its pictures, the first subject of it."""
    first: dict[tuple[str, str | None], SubjectFolder] = {}
    for one in cfg.data.each():
        first.setdefault((one.class_name, one.class_images), one)
    return list(first.values())


def class_photos(
    cfg: DreamboothConfig, family: Family, report: Report, subject: SubjectFolder, number: int = 0
) -> list[Photo]:
    """``train.prior_images`` pictures of a subject's class; missing ones are made by the base.

    Args:
        cfg: the settings.
        family: the base model.
        report: where it is said that pictures are made.
        subject: one of the class.
        number: of the class among those of the run, from 0.
    """
    folder = _class_folder(cfg, family, subject, number)
    folder.mkdir(parents=True, exist_ok=True)
    present = 0
    if any(folder.iterdir()):
        present = len(read_photos(folder, "data.class_images", limit=None)[0])
    missing = _unused_seeds(folder, cfg.train.prior_images - present)
    if missing:
        report.say(f"making {len(missing)} class images in {folder}")
        parts = family.components
        with parts.placed(parts.denoiser_name, *parts.text_encoders, "vae"):
            _make_class_images(family, class_prompt(subject.class_name), missing, folder)
    photos, _ = read_photos(folder, "data.class_images", limit=None)
    return photos[: cfg.train.prior_images]


def _unused_seeds(folder: Path, count: int) -> list[int]:
    """The first seeds whose picture is not in the folder: a lost one is made again."""
    seeds = (CLASS_SEED + index for index in itertools.count())
    unused = (seed for seed in seeds if not (folder / f"class-{seed}.png").exists())
    return list(itertools.islice(unused, max(0, count)))


def _make_class_images(family: Family, prompt: str, missing: Sequence[int], folder: Path) -> None:
    for start in range(0, len(missing), 16):
        seeds = missing[start : start + 16]
        # With fixed settings: sample.* may change before a resume, these pictures must not.
        images = sample_prompts(family, [prompt], seeds)[0]
        for seed, image in zip(seeds, images, strict=True):
            origin = {"prompt": prompt, "seed": seed, "base": family.components.base}
            save_png(image, folder / f"class-{seed}.png", origin)


def _class_folder(
    cfg: DreamboothConfig, family: Family, subject: SubjectFolder, number: int
) -> Path:
    if subject.class_images is not None:
        return Path(subject.class_images).expanduser()
    in_run = Path(cfg.output.dir).expanduser() / (
        f"class_images-{number + 1}" if number else "class_images"
    )
    cache = cache_dir()
    if cache is None or not cfg.data.cache:
        return in_run
    spec = [
        weights_digest(family.components.denoiser),
        str(family.components.dtype),
        subject.class_name,
        STEPS,
        GUIDANCE,
    ]
    name = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:24]
    folder = cache / "class-images" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"class images are kept in the run folder: {folder} cannot be made ({error.strerror})",
            stacklevel=2,
        )
        return in_run
    return folder if os.access(folder, os.W_OK) else in_run
