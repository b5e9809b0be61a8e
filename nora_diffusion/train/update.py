"""From losses to changed parameters: backward pass, gradients of all processes, optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nora_diffusion.train import common
from nora_diffusion.train.processes import Processes


@dataclass
class Update:
    """Every process holds all gradients and the whole optimiser; ``zero`` has its counterpart.

    Attributes:
        parameters: all that is trained, by name.
        optimizer: over these.
        scaler: of the loss; does nothing unless the base is float16.
        processes: whose gradients are averaged.
        max_grad_norm: gradients above are scaled down to it.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    processes: Processes
    max_grad_norm: float

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a loss's gradient to what the step has so far; ``last``: nothing follows in it."""
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Change the parameters; returns the gradient's norm before clipping."""
        parameters = list(self.parameters.values())
        self.processes.average_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimiser's tensors and numbers, for a checkpoint."""
        return (
            common.optimizer_tensors(self.optimizer, self.parameters),
            common.optimizer_numbers(self.optimizer, self.parameters),
        )

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None) -> None:
        """Inverse of ``state``, once the parameters are restored."""
        common.load_optimizer_tensors(self.optimizer, self.parameters, tensors, numbers)
