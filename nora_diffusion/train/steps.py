"""``train.steps = "auto"``: how long to train, from the number of photos."""

from __future__ import annotations

import math

from nora_diffusion.config import DreamboothConfig
from nora_diffusion.train.photos import all_photos, read_subjects

STEPS_A_PHOTO = 100
"""Steps with one picture each: what LoRA trainers commonly give a photo."""

FEWEST, MOST = 400, 2000
"""Fewer teach hardly anything from one or two photos; more than this only memorise them."""


def auto_steps(photos: int, pictures_a_step: int) -> int:
    """Optimiser steps for a subject, rounded up to tens.

    The noise of a gradient falls with the square root of the pictures in it, and an Adam step is as
    long as before, so n pictures a step are worth sqrt(n) steps rather than n (the square-root
    scaling rule, Malladi et al. 2022, arXiv 2205.10287, turned from the rate to the steps).

    Args:
        photos: of all subjects, at least 1.
        pictures_a_step: batch size times passes a step, at least 1.
    """
    steps = math.ceil(STEPS_A_PHOTO * photos / math.sqrt(pictures_a_step) / 10) * 10
    return min(MOST, max(FEWEST, steps))


def resolve_steps(cfg: DreamboothConfig, processes: int = 1) -> tuple[DreamboothConfig, str | None]:
    """The settings with a number for ``train.steps``, and a line that says where it is from.

    The line is None where a number was given. Each of the ``processes`` takes a batch of its own.

    Raises:
        UserError: when the photos cannot be counted.
    """
    train = cfg.train
    if train.steps != "auto":
        return cfg, None
    photos = len(all_photos(read_subjects(cfg)))
    pictures = train.batch_size * train.gradient_accumulation_steps * processes
    steps = auto_steps(photos, pictures)
    told = (
        f"train.steps = auto: {steps} steps, for {photos} photo{'s' if photos > 1 else ''} and "
        f"{pictures} picture{'s' if pictures > 1 else ''} a step"
    )
    return cfg.model_copy(update={"train": train.model_copy(update={"steps": steps})}), told
