"""The flow-matching loss that the rectified-flow families share.

A family brings a function that asks its denoiser for the velocity; what differs between families
(timestep convention, packing, guidance embedding, sign) stays inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nora_diffusion.config import UserError
from nora_diffusion.families import objective

Predict = Callable[[Tensor, Tensor], Tensor]
"""``predict(noisy (B, C, ...), sigmas (B,)) -> velocity (B, C, ...)``: noise minus picture."""


def scheduler_shift(config: Any, tokens: int) -> float:
    """Shift of sigmas that a flow-matching scheduler applies, for ``objective.shift_sigmas``.

    Args:
        config: of diffusers' flow-matching Euler scheduler. With ``use_dynamic_shifting`` the shift
            grows with the picture (Esser et al. 2024, sec. 5.3.2, as Flux.1 has it): its
            logarithm, or for ``time_shift_type = "linear"`` itself, lies on the straight line
            through ``base_shift`` and ``max_shift``. Otherwise it is ``shift``.
        tokens: image tokens of the denoiser.
    """
    if not config.use_dynamic_shifting:
        return float(config.shift)
    share = (tokens - config.base_image_seq_len) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = config.base_shift + share * (config.max_shift - config.base_shift)
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def flow_loss(
    predict: Predict,
    latents: Tensor,
    generator: torch.Generator,
    options: objective.LossOptions,
    shift: float,
    device: torch.device,
    dtype: torch.dtype,
    reference_predict: Predict | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) mean squared error of each sample's velocity (Esser et al. 2024, arXiv 2403.03206).

    Args:
        predict: the denoiser under training.
        latents: (B, C, ...) clean.
        generator: on the CPU; sigmas are drawn first, then the noise.
        options: of timesteps and noise.
        shift: of the drawn sigmas, > 0, as the base's scheduler shifts its own; 1 is none.
        device: where the denoiser is.
        dtype: number format in which ``predict`` is handed the noised latents; the sigmas come in
            float32 on the same device.
        reference_predict: the target is its answer at the same sigmas and noise; None: ε - x_0.
        mask: (B, 1, ...) in [0, 1], the share by which each place counts; None: all of it.

    Raises:
        UserError: when ``options`` ask for a signal-to-noise weight, which is of diffusion models.
    """
    if options.min_snr_gamma is not None:
        raise UserError(
            f"train.min_snr_gamma = {options.min_snr_gamma:g}: the base is a flow model, and this "
            'weight is for diffusion models; set it to "none" (train.timestep_law is what weighs '
            "noise levels here)"
        )
    whole, rows = options.part[1] * len(latents), objective.rows_of(options.part, len(latents))
    sigmas = objective.law_sigmas(options.timestep_law, whole, generator)[rows]
    shape = torch.Size((whole, *latents.shape[1:]))
    noise = objective.draw_noise(shape, generator, options.offset_noise)[rows].to(device)
    sigmas = objective.shift_sigmas(sigmas, shift).to(device)
    latents = latents.to(device)
    at = sigmas.reshape(-1, *[1] * (latents.ndim - 1))
    noisy = objective.interpolate(latents, noise, at).to(dtype)
    if reference_predict is None:
        target = objective.flow_target(latents, noise)
    else:
        with torch.no_grad():
            target = reference_predict(noisy, sigmas).float()
    error = (predict(noisy, sigmas).float() - target).square()
    return objective.mean_per_sample(error, None if mask is None else mask.to(device))
