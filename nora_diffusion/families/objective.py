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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class LossOptions:
    """How a family's loss draws timesteps and noise and weighs its samples (``train.*``).

    Attributes:
        min_snr_gamma: cap on the signal-to-noise weight; None: none. Diffusion only.
        soft_min_snr: the smooth form of that cap.
        timestep_law: where timesteps are drawn from; "default" is the family's own.
        offset_noise: standard deviation of a further noise that is constant over each channel.
        part: (k, n), the batch is part k, from 0, of one that n processes share: timesteps and
            noise are drawn for all of it, so that they are those of one process with the whole.
    """

    min_snr_gamma: float | None = None
    soft_min_snr: bool = False
    timestep_law: Literal["default", "uniform", "logit_normal", "mode"] = "default"
    offset_noise: float = 0.0
    part: tuple[int, int] = (0, 1)


def rows_of(part: tuple[int, int], size: int) -> slice:
    """Where in a shared batch part (k, n) of ``size`` rows is; see ``LossOptions.part``."""
    return slice(part[0] * size, (part[0] + 1) * size)


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


def law_timesteps(
    law: str, batch_size: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """(B,) int64 timesteps of a diffusion family; the default law is uniform.

    Other laws draw a share of the way to pure noise, as for flows, and round it down to a timestep.
    """
    if law in ("default", "uniform"):
        return uniform_timesteps(batch_size, num_timesteps, generator)
    shares = law_sigmas(law, batch_size, generator)
    return (shares * num_timesteps).long().clamp(max=num_timesteps - 1)


def law_sigmas(law: str, batch_size: int, generator: torch.Generator) -> Tensor:
    """(B,) sigmas of a flow family before any shift; the default law is logit-normal.

    Raises:
        ValueError: on an unknown ``law``.
    """
    if law in ("default", "logit_normal"):
        return logit_normal_sigmas(batch_size, generator)
    if law == "mode":
        return mode_sigmas(batch_size, generator)
    if law == "uniform":
        return torch.rand(batch_size, generator=generator, device=generator.device)
    raise ValueError(f"timestep_law={law!r}: use default, uniform, logit_normal or mode")


def mode_sigmas(batch_size: int, generator: torch.Generator, scale: float = 1.29) -> Tensor:
    """(B,) sigmas in [0, 1] by the heavy-tailed mode law (Esser et al. 2024, eq. 20).

    Args:
        batch_size: B.
        generator: of the uniform draw u.
        scale: s, -1 to 2/(pi - 2) for the law to stay monotonic; 0 is uniform.
    """
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    sigmas = 1 - u - scale * (torch.cos(torch.pi / 2 * u).square() - 1 + u)
    return sigmas.clamp(0, 1)


def draw_noise(shape: torch.Size, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise of a latents shape (B, C, ...), on the generator's device.

    Args:
        shape: of the latents.
        generator: of the draw; the noise itself is drawn first, so ``offset`` leaves it alone.
        offset: standard deviation of a further normal draw for each sample and channel, constant
            over space, by which a model learns very dark and very bright pictures (Guttenberg 2023,
            "Diffusion with offset noise").
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if offset:
        constant = torch.randn(
            *shape[:2], *[1] * (len(shape) - 2), generator=generator, device=generator.device
        )
        noise = noise + offset * constant
    return noise


def mean_per_sample(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) mean of an error (B, C, ...) over all but the first dimension, under a mask.

    Args:
        error: of every latent value.
        mask: (B, 1, ...) in [0, 1], the share by which each place counts; None: all of it. The mean
            is over the whole picture, so that a small subject does not get a large weight.
    """
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(dim=1)


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


def snr_weight(
    alphas_cumprod: Tensor, timesteps: Tensor, options: LossOptions, prediction_type: str
) -> Tensor | None:
    """(B,) weights that ``options`` ask for, or None; see the two functions below."""
    if options.min_snr_gamma is None:
        return None
    law = soft_min_snr_weight if options.soft_min_snr else min_snr_weight
    return law(alphas_cumprod, timesteps, options.min_snr_gamma, prediction_type)


def soft_min_snr_weight(
    alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str
) -> Tensor:
    """Soft-Min-SNR-γ (Crowson et al. 2024, arXiv 2401.11605): SNR γ / (SNR + γ) on x_0.

    As ``min_snr_weight``, with the harmonic instead of the smaller of the two: half the cap where
    SNR = γ, and the same limits at both ends.

    Returns:
        (B,) weights, finite and ≥ 0.
    """
    signal = alphas_cumprod[timesteps]
    noise = 1 - signal
    shared = gamma / (signal + gamma * noise)  # weight on x_0 divided by SNR, times 1/noise
    if prediction_type == "epsilon":  # γ / (SNR + γ)
        return shared * noise
    if prediction_type == "v_prediction":  # SNR γ / ((SNR + γ)(SNR + 1))
        return shared * signal * noise
    return shared * signal


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
