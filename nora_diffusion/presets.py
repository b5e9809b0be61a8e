"""What is chosen for the user: settings for a card of a given size, steps for so many photos.

A preset (``--preset``) goes before the config file and after the command line. The table here is
all there is to one: help, ``docs/config.md`` and ``--dry-run`` are made from it.
"""

import difflib
import math
from typing import Any, NamedTuple

from nora_diffusion.settings import ConfigError, quote


class Choice(NamedTuple):
    """One setting of a preset.

    Attributes:
        key: ``section.key``.
        value: as it would stand in a config file.
        why: one sentence.
    """

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {quote(self.value)}: {self.why}"


_BF16 = Choice("model.dtype", "bf16", "Halves the frozen base; the trained pairs stay in float32.")
_CHECKPOINTING = Choice(
    "train.gradient_checkpointing",
    True,
    "Recomputes activations in the backward pass: a fraction of the memory for a second forward "
    "pass.",
)

PRESETS: dict[str, tuple[Choice, ...]] = {
    "8gb": (
        _BF16,
        Choice("train.batch_size", 1, "One picture at a time has the smallest activations."),
        Choice(
            "train.gradient_accumulation_steps",
            4,
            "Four passes make one step, so a step still learns from four pictures.",
        ),
        _CHECKPOINTING,
    ),
    "12gb": (
        _BF16,
        Choice("train.batch_size", 2, "Two pictures at a time keep the card busier than one."),
        Choice(
            "train.gradient_accumulation_steps",
            2,
            "Two passes make one step, so a step still learns from four pictures.",
        ),
        _CHECKPOINTING,
    ),
    "16gb": (
        _BF16,
        Choice("train.batch_size", 4, "All four pictures of a step fit in one pass."),
        Choice("train.gradient_accumulation_steps", 1, "One pass is a whole step."),
        _CHECKPOINTING,
    ),
    "24gb": (
        _BF16,
        Choice(
            "train.batch_size",
            2,
            "Two pictures fit with all their activations kept, which is quicker than four with "
            "recomputing.",
        ),
        Choice(
            "train.gradient_accumulation_steps",
            2,
            "Two passes make one step, so a step still learns from four pictures.",
        ),
        Choice(
            "train.gradient_checkpointing",
            False,
            "There is room to keep the activations, so nothing is computed twice.",
        ),
    ),
}
"""Every preset makes steps of four pictures, so that steps and learning rate mean the same."""


def find_preset(name: str) -> tuple[Choice, ...]:
    """The choices of a preset.

    Raises:
        ConfigError: when there is none of that name.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
    problem = f"--preset = {quote(name)}: unknown; the presets are {', '.join(PRESETS)}"
    problem += f"; did you mean {near[0]}?" if near else ""
    raise ConfigError([problem], "the command line")


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
