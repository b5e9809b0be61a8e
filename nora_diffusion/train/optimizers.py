"""The optimisers of ``train.optimizer``, each from the library that keeps it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nora_diffusion.config import DreamboothConfig, Train, UserError
from nora_diffusion.families.base import resolve_device
from nora_diffusion.train.common import copy_into, make_adamw

Groups = Sequence[tuple[Sequence[nn.Parameter], float]]
"""Parameters and their peak learning rate."""

LIBRARIES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
"""Those that do not come with torch and transformers, from the extra ``optimizers``."""

SMALLEST_8BIT = 4096
"""Numbers a matrix must have for an 8-bit state: bitsandbytes' own bound; smaller ones get float32.

An inner matrix has r x inner_r numbers, so 512 by default: there is little to save.
"""
BLOCK_8BIT = 256
"""Numbers that share one float32 scale in an 8-bit state; also the entries of its code book."""


def check_optimizer(cfg: DreamboothConfig) -> None:
    """See to it that the optimiser can be had, before anything is loaded.

    Raises:
        UserError: when its library is missing, or cannot work on the device.
    """
    name = cfg.train.optimizer
    if name not in LIBRARIES:
        return
    library = LIBRARIES[name]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f'train.optimizer = "{name}": it needs {library}, which is not installed; run: '
            'pip install "nora-diffusion[optimizers]", or set it to "adamw"'
        ) from error
    if name == "adamw_8bit":
        try_eight_bits(cfg.train, resolve_device(cfg.model.device))


def try_eight_bits(cfg: Train, device: torch.device) -> None:
    """Make one 8-bit step: the kernels for it are compiled for some devices only.

    Raises:
        UserError: when it fails.
    """
    try:
        probe = nn.Parameter(torch.zeros(SMALLEST_8BIT, device=device))
        probe.grad = torch.zeros_like(probe)
        make_optimizer(cfg, [([probe], 1e-3)]).step()
    except Exception as error:  # whatever a missing kernel ends in
        raise UserError(
            f'train.optimizer = "adamw_8bit": the installed bitsandbytes cannot do its step on '
            f'{device} ({error}); set it to "adamw", or try a newer bitsandbytes'
        ) from error


def make_optimizer(cfg: Train, groups: Groups) -> torch.optim.Optimizer:
    """The optimiser over ``groups``, ready for its first step."""
    if cfg.optimizer == "adamw":
        return make_adamw(groups, cfg.weight_decay)
    given: list[dict[str, Any]] = [
        {"params": list(parameters), "lr": rate, "peak_lr": rate}
        for parameters, rate in groups
        if parameters
    ]
    decay: Any = cfg.weight_decay
    if cfg.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # The rate as given: steps in proportion to a parameter's size would never leave 0, where
        # half of the inner pairs begin. torch's own Adafactor always takes such steps.
        return Adafactor(given, scale_parameter=False, relative_step=False, weight_decay=decay)
    if cfg.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(given, weight_decay=decay, min_8bit_size=SMALLEST_8BIT)
    if cfg.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # As its authors advise for Adam's habits and for runs with a warm-up.
        return Prodigy(given, weight_decay=decay, use_bias_correction=True, safeguard_warmup=True)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(given, weight_decay=decay)
    optimizer.train()
    return optimizer


def rate_groups(
    cfg: DreamboothConfig, parameters: Mapping[str, nn.Parameter], denoiser: str
) -> Groups:
    """All that is trained with its peak rates: denoiser before text encoders, P before Q.

    Q may learn at a share of P's rate, as in LoRA+ (Hayou et al. 2024, arXiv 2402.12354), to stay
    nearer to where a fitted start has turned it.

    Args:
        cfg: of the run.
        parameters: by name, the component's before the first dot.
        denoiser: name of that component.
    """
    ratio = 1.0 if cfg.train.optimizer == "prodigy" else cfg.train.loraplus_lr_ratio
    text_rate = cfg.text_encoder.learning_rate or cfg.train.learning_rate
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (of_text, of_Q): [] for of_text in (False, True) for of_Q in (False, True)
    }
    for name, parameter in parameters.items():
        of_text = not name.startswith(f"{denoiser}.")
        groups[of_text, ratio != 1 and "inner_A" in name].append(parameter)
    return [
        (found, (text_rate if of_text else cfg.train.learning_rate) / (ratio if of_Q else 1.0))
        for (of_text, of_Q), found in groups.items()
    ]


@contextmanager
def evaluation_weights(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """The parameters an optimiser means to be used, in place of those it trains at.

    They differ with schedule-free alone. It could switch back by arithmetic, but not to the bit, so
    the parameters are kept aside.
    """
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    switched: Any = optimizer
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    switched.eval()
    try:
        yield
    finally:
        switched.train()
        copy_into(parameters, trained)


def optimizer_bytes(cfg: DreamboothConfig, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes of optimiser state for the inner pairs of a run, by their names."""
    name = cfg.train.optimizer
    total = 0
    for path, parameter in parameters.items():
        count = parameter.numel()
        if name == "adafactor":  # a mean for each row and for each column
            total += 4 * sum(parameter.shape)
        elif name == "adamw_8bit" and count >= SMALLEST_8BIT:
            total += 2 * (count + 4 * math.ceil(count / BLOCK_8BIT))
        elif name == "prodigy":  # with the start, which it does not keep where that is all zero
            zero = cfg.adapter.init != "sigma" and path.endswith(".inner_B")
            total += 4 * count * (3 if zero else 4)
        else:
            total += 2 * 4 * count
    if name == "adamw_8bit" and any(p.numel() >= SMALLEST_8BIT for p in parameters.values()):
        total += 2 * 4 * BLOCK_8BIT
    return total
