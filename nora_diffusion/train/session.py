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
from nora_diffusion.train.processes import ALONE, Processes
from nora_diffusion.train.report import Report
from nora_diffusion.train.update import Update
from nora_diffusion.train.zero import ZeroUpdate


@dataclass
class Session:
    """A run in progress.

    Attributes:
        run: the run folder.
        base_hash: digest of the denoiser's frozen weights, as loaded.
        models: those with an adapter, by component name, denoiser first.
        parameters: the inner pairs by name: all that is trained, float32.
        scaler: of the loss; does nothing unless the base is float16.
        update: backward passes and optimiser steps.
        processes: that train together.
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
    update: Update | ZeroUpdate
    ema: MovingAverage | None
    guard: DivergenceGuard
    processes: Processes = ALONE
    step: int = 0

    @property
    def draws(self) -> bool:
        """Whether this process is needed for a picture: the first, or with FSDP each."""
        return self.processes.first or self.processes.shards > 1
