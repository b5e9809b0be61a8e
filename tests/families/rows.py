"""The table of families under test, and what is done with a row of it.

Losses are compared with the published equations, written out here once more: nothing is imported
from ``objective.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.mapping import inject_adapter_in_model
from torch import Tensor

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.families import family_class
from nora_diffusion.families.base import Conditioning
from tests.tiny import tiny_pipeline, train
from tests.tiny_dit import tiny_dit

CPU = torch.device("cpu")
PROMPTS = ["a photo of a sks toy", "a toy"]
T = 1000


@dataclass(frozen=True)
class Row:
    """A family under test.

    Attributes:
        config: name of the shipped configs that the tiny model is made from.
        family: name of the family.
        latents: shape of one latent, (C, h, w).
        answer: ``answer(denoiser, noisy, at, conditioning)`` calls the denoiser as its pipeline
            does and returns ε or the velocity; ``at`` is the timestep, or sigma of a flow.
        modules: attention layers of the tiny denoiser.
        text_modules: attention layers of the text encoders that are adapted.
        signal: (T,) ᾱ of a diffusion family; None: a flow.
        shift: of a flow's sigmas.
    """

    config: str
    family: str
    latents: tuple[int, ...]
    answer: Callable[..., Tensor]
    modules: int
    text_modules: int
    signal: Tensor | None = None
    shift: float = 1.0

    def build(self) -> Any:
        return tiny_pipeline("sdxl") if self.config == "sdxl" else tiny_dit(self.config)

    def load(self, pipe: Any = None) -> Any:
        pipe = self.build() if pipe is None else pipe
        return family_class(self.family).from_pipeline(
            pipe, base=self.config, dtype=torch.float32, device=CPU
        )


def cumulated(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)


SCALED_LINEAR = cumulated(torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)


def sdxl(denoiser, noisy, at, conditioning):
    # Size of the photo, crop, size of the picture: an uncut one of 2 px a latent.
    side = 2.0 * noisy.shape[-1]
    told = conditioning.extra.get("time_ids", torch.tensor([[side, side, 0, 0, side, side]]))
    added = {
        "text_embeds": conditioning.extra["pooled"],
        "time_ids": told.expand(len(noisy), 6),
    }
    states = conditioning.prompt_embeds
    return denoiser(noisy, at, encoder_hidden_states=states, added_cond_kwargs=added).sample


def sd3(denoiser, noisy, at, conditioning):
    return denoiser(
        hidden_states=noisy,
        timestep=T * at,
        encoder_hidden_states=conditioning.prompt_embeds,
        pooled_projections=conditioning.extra["pooled"],
    ).sample


ROWS = [
    Row("sdxl", "sdxl", (4, 8, 8), sdxl, modules=88, text_modules=16, signal=SCALED_LINEAR),
    Row("sd3", "sd3", (16, 8, 8), sd3, modules=15, text_modules=16, shift=3.0),
    Row("sd35_medium", "sd3", (16, 8, 8), sd3, modules=19, text_modules=16, shift=3.0),
]


def batch(row: Row, family: Any, size: int = 4) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(size, *row.latents, generator=generator)
    with torch.no_grad():
        return latents, family.encode_prompts(PROMPTS).select([n % 2 for n in range(size)])


def published_loss(row: Row, family: Any, latents: Tensor, given: Conditioning, seed: int):
    """Ho et al. 2020, eq. 14, of ε; or Esser et al. 2024, eqs. 19 and 23, of the velocity."""
    generator, size = torch.Generator().manual_seed(seed), len(latents)
    if row.signal is not None:
        at = torch.randint(T, (size,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        signal = row.signal[at].reshape(-1, 1, 1, 1)
        noisy, target = signal.sqrt() * latents + (1 - signal).sqrt() * noise, noise
    else:
        drawn = torch.sigmoid(torch.randn(size, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        at = row.shift * drawn / (1 + (row.shift - 1) * drawn)
        share = at.reshape(-1, *[1] * (latents.ndim - 1))
        noisy, target = (1 - share) * latents + share * noise, noise - latents
    answer = row.answer(family.components.denoiser, noisy.float(), at, given)
    return ((answer - target) ** 2).flatten(1).mean(dim=1)


@torch.no_grad()
def predict(row: Row, family: Any) -> Tensor:
    """One denoiser call under freshly encoded prompts, float32."""
    latents, given = batch(row, family, 2)
    at = torch.tensor([801, 121]) if row.signal is not None else torch.tensor([0.8, 0.1])
    return row.answer(family.components.denoiser, latents, at, given)


def adapt(row: Row, family: Any) -> int:
    """Adapt the denoiser's attention and the text encoders, moved as if trained."""
    parts, count = family.components, 0
    models = {parts.denoiser_name: (parts.denoiser, family.targets["attention"])}
    models |= {name: (encoder, family.text_targets) for name, encoder in text_encoders(family)}
    for model, targets in models.values():
        inject_adapter_in_model(NoraConfig(r=8, inner_r=2, target_modules=list(targets)), model)
        count += train(model, step=0.5)
    assert count == row.modules + row.text_modules
    return count


def text_encoders(family: Any) -> list[tuple[str, Any]]:
    endings = tuple(f".{ending}" for ending in family.text_targets)
    return [
        (name, encoder)
        for name, encoder in family.components.text_encoders.items()
        if any(module.endswith(endings) for module, _ in encoder.named_modules())
    ]
