"""Atomic training state for the recipe: tensors in safetensors, the rest as JSON in its header."""

import json
import math
import os
from pathlib import Path
from time import monotonic
from typing import Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def save_state(path: Path, tensors: dict[str, torch.Tensor], progress: dict) -> None:
    """Writes `tensors` and `progress` to `path`; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    packed = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    save_file(packed, temporary, metadata={"progress": json.dumps(progress)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what `save_state` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["progress"])


class Clock:
    """The wall time of a run, against a limit or none.

    Args:
        minutes: the limit of the whole run; None is no limit.
    """

    def __init__(self, minutes: float | None = None):
        self.limit_s = math.inf if minutes is None else 60 * minutes
        self._begin = monotonic()

    def add(self, seconds: float) -> None:
        """Counts what the run took before it was stopped and continued."""
        self._begin -= seconds

    def seconds(self) -> float:
        """Of the run so far."""
        return monotonic() - self._begin

    def share(self) -> float:
        """Of the limit that is used up: 0 without one, 1 or more when the run must end."""
        return self.seconds() / self.limit_s


class Trained(Generic[Module]):
    """A module under training: its AdamW state and an average of its weights, saved together.

    Args:
        module: what is trained.
        learning_rate: the peak of the schedule.
        ema_decay: decay of the running average per step; the average warms up from step 0.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        module: Module,
        learning_rate: float,
        ema_decay: float = 0.999,
        weight_decay: float = 0.0,
    ):
        self.module, self.ema_decay, self.step = module, ema_decay, 0
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters: list[torch.Tensor] = list(module.parameters())
        self.fused = all(p.is_cuda for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=self.fused or None,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.learning_rate = learning_rate

    @torch.no_grad()
    def update(self, learning_rate: float, max_grad_norm: float = 1.0) -> torch.Tensor:
        """Takes one optimiser step and returns the gradient's norm before clipping.

        The norm is a scalar on the module's device: reading it makes a GPU wait.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return norm

    def use_average(self) -> Module:
        """Copies the averaged weights into the module and returns it; for export and scoring."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(average)
        return self.module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that `restore` needs, by name."""
        out = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            out[f"weight.{name}"], out[f"average.{name}"] = parameter, average
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Continues from the tensors of `tensors()` at `step`."""
        self.step = step
        for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            parameter.data.copy_(tensors[f"weight.{name}"])
            self.average[i].copy_(tensors[f"average.{name}"])
            if f"step.{name}" in tensors:
                step_tensor = tensors[f"step.{name}"]
                self.optimizer.state[parameter] = {
                    # The fused update counts where the parameter is, the others on the CPU.
                    "step": step_tensor.to(parameter.device) if self.fused else step_tensor,
                    # In the parameter's own memory format: the fused update needs them alike.
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
                }


def learning_rate_at(
    step: int, total: int, peak: float, warmup: int = 200, elapsed: float = 0.0
) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak.

    The cosine ends at `total` steps, or where `elapsed`, the used share of a time limit, is 1: it
    follows the one that is further.
    """
    share = min(1.0, max(elapsed, (step - warmup) / max(1, total - warmup)))
    low = peak / 50
    rate = low + (peak - low) * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
    return min(peak * (step + 1) / warmup, rate) if step < warmup else rate
