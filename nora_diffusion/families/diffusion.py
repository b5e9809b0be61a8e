"""The loss that the diffusion families share; ``flow.py`` is its counterpart for flow models.

A family brings a function that asks its denoiser; what differs between families (conditioning,
channels that are not of the prediction) stays inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nora_diffusion.config import UserError
from nora_diffusion.families import objective

Predict = Callable[[Tensor, Tensor], Tensor]
"""``predict(noisy (B, C, h, w), timesteps (B,) int64) -> prediction (B, C, h, w)``."""


def noise_schedule(scheduler: Any, base: str) -> tuple[Tensor, str]:
    """``alphas_cumprod`` (T,) and the prediction type that a base was trained with.

    Args:
        scheduler: of the base's pipeline.
        base: what the base was loaded from, for the message.

    Raises:
        UserError: when the scheduler names a prediction type that is not of diffusion.
    """
    prediction_type = str(scheduler.config.prediction_type)
    if prediction_type not in objective.PREDICTION_TYPES:
        raise UserError(
            f'model.base = "{base}": its scheduler says prediction_type = "{prediction_type}"; '
            f"use one of {', '.join(objective.PREDICTION_TYPES)}"
        )
    # A copy: samplers may rescale their own.
    return scheduler.alphas_cumprod.detach().clone().float(), prediction_type


def unet_multiple(pipe: Any) -> int:
    """What sides of pictures, in px, must be multiples of so that a UNet halves them evenly."""
    return int(pipe.vae_scale_factor) * 2 ** (len(pipe.unet.config.down_block_types) - 1)


def diffusion_loss(
    predict: Predict,
    latents: Tensor,
    generator: torch.Generator,
    options: objective.LossOptions,
    alphas_cumprod: Tensor,
    prediction_type: str,
    device: torch.device,
    dtype: torch.dtype,
    reference_predict: Predict | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) mean squared error of each sample's prediction (Ho et al. 2020, eq. 14).

    Args:
        predict: the denoiser under training.
        latents: (B, C, h, w) clean.
        generator: on the CPU; timesteps are drawn first, then the noise.
        options: of timesteps, noise and weights.
        alphas_cumprod: (T,) on the CPU.
        prediction_type: one of ``objective.PREDICTION_TYPES``.
        device: where the denoiser is.
        dtype: number format in which ``predict`` is handed the noised latents.
        reference_predict: the target is its answer at the same timesteps and noise; None: that of
            ``prediction_type``.
        mask: (B, 1, h, w) in [0, 1], the share by which each place counts; None: all of it.
    """
    whole, rows = options.part[1] * len(latents), objective.rows_of(options.part, len(latents))
    timesteps = objective.law_timesteps(
        options.timestep_law, whole, len(alphas_cumprod), generator
    )[rows]
    shape = torch.Size((whole, *latents.shape[1:]))
    noise = objective.draw_noise(shape, generator, options.offset_noise)[rows].to(device)
    alpha, sigma = objective.alpha_sigma(alphas_cumprod, timesteps, latents.ndim)
    alpha, sigma, latents = alpha.to(device), sigma.to(device), latents.to(device)
    noisy, at = objective.add_noise(latents, noise, alpha, sigma).to(dtype), timesteps.to(device)
    if reference_predict is None:
        target = objective.diffusion_target(prediction_type, latents, noise, alpha, sigma)
    else:
        with torch.no_grad():
            target = reference_predict(noisy, at).float()
    error = (predict(noisy, at).float() - target).square()
    loss = objective.mean_per_sample(error, None if mask is None else mask.to(device))
    weight = objective.snr_weight(alphas_cumprod, timesteps, options, prediction_type)
    return loss if weight is None else loss * weight.to(device)
