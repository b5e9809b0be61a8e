"""What the steps of one DreamBooth run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nora_diffusion.config import DreamboothConfig
from nora_diffusion.families.base import Family
from nora_diffusion.train.common import DivergenceGuard, MovingAverage
from nora_diffusion.train.inputs import Inputs
from nora_diffusion.train.report import Report


@dataclass
class Session:
    """A run in progress.

    Attributes:
        run: the run folder.
        base_hash: digest of the denoiser's frozen weights, as loaded.
        models: those with an adapter, by component name, denoiser first.
        parameters: the inner pairs by name: all that is trained, float32.
        scaler: of the loss; does nothing unless the base is float16.
        step: optimiser steps completed.
    """

    cfg: DreamboothConfig
    run: Path
    report: Report
    family: Family
    inputs: Inputs
    base_hash: str
    models: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    guard: DivergenceGuard
    step: int = 0
