"""Diffusion and flow objectives: noising, targets, timestep laws and loss weights.

Pure functions on tensors, shared by all families. Glossary, as in diffusers:

    latents   x_0    (B, C, h, w)   clean, scaled to about unit variance
    noise     ε      (B, C, h, w)   standard normal
    timesteps t      (B,) int64     0 .. T-1, T-1 the noisiest
    alpha     α_t    (B, 1, 1, 1)   share of the signal, sqrt(alphas_cumprod[t])
    sigma     σ_t    (B, 1, 1, 1)   share of the noise, sqrt(1 - alphas_cumprod[t])
    target           (B, C, h, w)   what the denoiser is asked for

A zero-terminal-SNR schedule (Lin et al. 2023, arXiv 2305.08891) has alphas_cumprod[T-1] = 0; every
function here is finite there.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alpha_sigma(alphas_cumprod: Tensor, timesteps: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
    """Signal and noise shares of each sample (Ho et al. 2020, eq. 4).

    Args:
        alphas_cumprod: (T,) in [0, 1], falling.
        timesteps: (B,) indices into it.
        ndim: number of dimensions of the latents the result is broadcast against.

    Returns:
        alpha and sigma, each (B, 1, ..., 1) with ``ndim`` dimensions; alpha² + sigma² = 1.
    """
    signal = alphas_cumprod[timesteps].reshape(-1, *[1] * (ndim - 1))
    return signal.sqrt(), (1 - signal).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Diffuse clean latents to their timestep: α x_0 + σ ε (Ho et al. 2020, eq. 4)."""
    return alpha * latents + sigma * noise


def diffusion_target(
    prediction_type: str, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """What a denoiser of this parameterisation should answer to the noised latents.

    ``"epsilon"`` ε (Ho et al. 2020, eq. 14); ``"v_prediction"`` α ε - σ x_0 (Salimans and Ho 2022,
    arXiv 2202.00512, app. D); ``"sample"`` x_0.

    Raises:
        ValueError: on another ``prediction_type``.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * latents
    if prediction_type == "sample":
        return latents
    raise ValueError(
        f"the base's scheduler has prediction_type={prediction_type!r}; "
        f"supported are {', '.join(PREDICTION_TYPES)}"
    )


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Point at ``sigma`` in [0, 1] on the straight path from x_0 to ε: (1-σ) x_0 + σ ε.

    Rectified flow (Liu et al. 2022, arXiv 2209.03003, eq. 1); ``sigma`` broadcasts.
    """
    return (1 - sigma) * latents + sigma * noise


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Velocity of that path, ε - x_0, the same at every ``sigma``."""
    return noise - latents


def uniform_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """(B,) int64 timesteps, uniform over 0 .. num_timesteps-1, on the generator's device."""
    return torch.randint(num_timesteps, (batch_size,), generator=generator, device=generator.device)


def logit_normal_sigmas(
    batch_size: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """(B,) sigmas in (0, 1) whose logit is normal (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return torch.sigmoid(mean + std * normal)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise for larger images (Esser et al. 2024, eq. 23); 1 changes nothing.

    Args:
        sigmas: in [0, 1]; both ends stay where they are.
        shift: > 0, the square root of the ratio of pixel counts.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def min_snr_weight(
    alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str
) -> Tensor:
    """Min-SNR-γ weight of each sample (Hang et al. 2023, arXiv 2303.09556, sec. 3.4).

    min(SNR, γ) on the x_0 loss; as weight of the prediction's own loss that is min(SNR, γ)/SNR for
    ε and min(SNR, γ)/(SNR + 1) for v. Written with SNR = ᾱ/(1-ᾱ) multiplied out, so that the ends
    ᾱ = 0 (zero terminal SNR) and ᾱ = 1 take their limits instead of 0/0.

    Args:
        alphas_cumprod: (T,) ᾱ.
        timesteps: (B,).
        gamma: cap on the SNR, > 0.
        prediction_type: see ``diffusion_target``.

    Returns:
        (B,) weights, finite and ≥ 0.
    """
    signal = alphas_cumprod[timesteps]
    noise = 1 - signal
    if prediction_type == "epsilon":  # min(1, γ/SNR); the limit at SNR 0 is 1
        tiny = torch.finfo(signal.dtype).tiny
        return (gamma * noise / signal.clamp(min=tiny)).clamp(max=1.0)
    weight = torch.minimum(signal, gamma * noise)  # min(SNR, γ) / (SNR + 1)
    if prediction_type == "v_prediction":
        return weight
    return weight / noise.clamp(min=torch.finfo(signal.dtype).eps)
