"""ZeRO-2 by DeepSpeed: each process keeps a part of the gradients and of the optimiser's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nora_diffusion.train import common

STATES = ("exp_avg", "exp_avg_sq")
"""Of AdamW: one number for each trained one."""


class ZeroUpdate:
    """As ``update.Update``, by a DeepSpeed engine over the trained parameters alone.

    The frozen base is none of the engine's business: a loss may be computed anywhere, since the
    engine listens to the parameters' gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
    ) -> None:
        """Hand parameters, as they are now, and optimiser over to DeepSpeed.

        Args:
            parameters: all that is trained, by name.
            optimizer: AdamW over these.
            settings: of DeepSpeed, from ``launcher.deepspeed_settings``.
        """
        import deepspeed  # pyright: ignore[reportMissingImports]

        self.parameters = parameters
        self.optimizer = optimizer
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=nn.ParameterList(parameters.values()),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        # AdamW would make the same with its first step. But DeepSpeed looks for it once only, after
        # the step of the first group, and would never see that of the text encoders.
        for flat in self._flat():
            state = {name: torch.zeros_like(flat) for name in STATES}
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **state}
        self.zero._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See ``Update.backward``."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> float:
        """See ``Update.step``."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See ``Update.state``; put together from all processes, so that any number can go on."""
        from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
            safe_get_full_optimizer_state,
        )

        steps = self.optimizer.state[self._flat()[0]]["step"]
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"{name}/step"] = steps.clone()
            for state in STATES:
                whole: Any = safe_get_full_optimizer_state(parameter, state)
                tensors[f"{name}/{state}"] = whole
        return tensors, common.optimizer_numbers(self.optimizer, {})

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None) -> None:
        """See ``Update.restore``."""
        from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        steps = next(value for name, value in tensors.items() if name.endswith("/step"))
        for flat in self._flat():
            self.optimizer.state[flat]["step"].copy_(steps)
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, parameter.detach())
            for state in STATES:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{state}"], state)

    def _flat(self) -> list[Tensor]:
        """This process's part of each group of parameters, as DeepSpeed gives it to AdamW."""
        return [flat for group in self.optimizer.param_groups for flat in group["params"]]
