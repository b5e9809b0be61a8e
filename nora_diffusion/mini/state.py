"""Atomic training state for the recipe: tensors in safetensors, the rest as JSON in its header."""

import json
import os
from pathlib import Path
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
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.learning_rate = learning_rate

    def update(self, learning_rate: float, max_grad_norm: float = 1.0) -> float:
        """Takes one optimiser step and returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        return float(norm)

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
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"],
                    # In the parameter's own memory format: the fused update needs them alike.
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
                }


def learning_rate_at(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    low = peak / 50
    return low + (peak - low) * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
