"""The table of families under test, and what is done with a row of it.

Losses are compared with the published equations, written out here once more: nothing is imported
from ``objective.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from peft.mapping import inject_adapter_in_model
from torch import Tensor

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.families import family_class
from nora_diffusion.families.base import Conditioning
from tests.families import flow_answers as flow
from tests.tiny import FAMILIES as UNETS
from tests.tiny import tiny_pipeline, train
from tests.tiny_dit import tiny_dit
from tests.tiny_flow import TINY_FLOW, tiny_flow

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
        encode: ``encode(pipe, prompts)`` gives what the pipeline's own ``encode_prompt`` does.
        modules: attention layers of the tiny denoiser.
        text_modules: attention layers of the text encoders that are adapted.
        signal: (T,) ᾱ of a diffusion family; None: a flow.
        velocity: whether such a family answers v.
        shift: of a flow's sigmas.
        text_travels: whether other programs load a LoRA of its text encoders.
    """

    config: str
    family: str
    latents: tuple[int, ...]
    answer: Callable[..., Tensor]
    encode: Callable[[Any, list[str]], Conditioning]
    modules: int
    text_modules: int
    signal: Tensor | None = None
    velocity: bool = False
    shift: float = 1.0
    text_travels: bool = True

    def build(self) -> Any:
        if self.config in UNETS:
            return tiny_pipeline(self.config)
        return (tiny_flow if self.config in TINY_FLOW else tiny_dit)(self.config)

    def load(self, pipe: Any = None) -> Any:
        pipe = self.build() if pipe is None else pipe
        return family_class(self.family).from_pipeline(
            pipe, base=self.config, dtype=torch.float32, device=CPU
        )


def cumulated(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)


SCALED_LINEAR = cumulated(torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)
LINEAR = cumulated(torch.linspace(0.0001, 0.02, T, dtype=torch.float64))


def sd(denoiser, noisy, at, conditioning):
    return denoiser(noisy, at, encoder_hidden_states=conditioning.prompt_embeds).sample


def states(pipe, prompts):
    return Conditioning(pipe.encode_prompt(prompts, CPU, 1, False)[0])


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


def with_pooled(pipe, prompts):
    others = {f"prompt_{n}": None for n in (2, 3) if hasattr(pipe, f"tokenizer_{n}")}
    encoded = pipe.encode_prompt(prompts, **others, do_classifier_free_guidance=False)
    return Conditioning(encoded[0], {"pooled": encoded[2]})


def pixart(denoiser, noisy, at, conditioning):
    answer = denoiser(
        noisy,
        timestep=at,
        encoder_hidden_states=conditioning.prompt_embeds,
        encoder_attention_mask=conditioning.extra["prompt_attention_mask"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return answer.chunk(2, dim=1)[0]  # ε; the other half is a variance


def sana(denoiser, noisy, at, conditioning):
    return denoiser(
        noisy,
        timestep=T * at,
        encoder_hidden_states=conditioning.prompt_embeds,
        encoder_attention_mask=conditioning.extra["prompt_attention_mask"],
    ).sample


def with_mask(pipe, prompts, **options):
    states, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
    return Conditioning(states, {"prompt_attention_mask": mask})


def instructed(pipe, prompts):
    lines = signature(pipe.__call__).parameters["complex_human_instruction"].default
    return with_mask(pipe, prompts, complex_human_instruction=lines)


SD3 = {"latents": (16, 8, 8), "answer": sd3, "encode": with_pooled, "shift": 3.0}
FLUX = {"latents": (16, 8, 8), "answer": flow.flux, "encode": flow.encode_flux}

SD = {"latents": (4, 8, 8), "answer": sd, "encode": states, "signal": SCALED_LINEAR}

ROWS = [
    Row("sd15", "sd", **SD, modules=32, text_modules=8),
    Row("sd2", "sd", **SD, modules=32, text_modules=8, velocity=True),
    Row(
        "sdxl", "sdxl", (4, 8, 8), sdxl, with_pooled, modules=88, text_modules=16,
        signal=SCALED_LINEAR,
    ),
    Row("sd3", "sd3", **SD3, modules=15, text_modules=16),
    Row("sd35_medium", "sd3", **SD3, modules=19, text_modules=16),
    Row("flux_dev", "flux", **FLUX, modules=14, text_modules=8, shift=flow.FLUX_SHIFT),
    Row("flux_schnell", "flux", **FLUX, modules=14, text_modules=8),
    Row(
        "flux2_klein_base_4b", "flux2_klein", (16, 4, 4), flow.flux2_klein, flow.encode_flux2_klein,
        modules=12, text_modules=0, shift=flow.FLUX_SHIFT,
    ),
    Row(
        "z_image", "z_image", (16, 8, 8), flow.z_image, flow.encode_z_image,
        modules=16, text_modules=0, shift=6.0,
    ),
    Row(
        "pixart_sigma", "pixart", (4, 8, 8), pixart, with_mask, modules=16, text_modules=8,
        signal=LINEAR,
    ),
    Row(
        "sana", "sana", (4, 16, 16), sana, instructed, modules=16, text_modules=4, shift=3.0,
        text_travels=False,
    ),
]  # fmt: skip


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
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        target = noise
        if row.velocity:  # Salimans and Ho 2022, appendix D
            target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
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


def adapt(row: Row, family: Any, text: bool = True, **fields: Any) -> int:
    """Adapt the denoiser's attention and the text encoders, moved as if trained."""
    parts, count = family.components, 0
    models = {parts.denoiser_name: (parts.denoiser, family.targets["attention"])}
    if text:
        models |= {name: (encoder, family.text_targets) for name, encoder in text_encoders(family)}
    for model, targets in models.values():
        config = NoraConfig(r=8, inner_r=2, target_modules=list(targets), **fields)
        inject_adapter_in_model(config, model)
        count += train(model, step=0.5)
    assert count == row.modules + (row.text_modules if text else 0)
    return count


def text_encoders(family: Any) -> list[tuple[str, Any]]:
    endings = tuple(f".{ending}" for ending in family.text_targets)
    return [
        (name, encoder)
        for name, encoder in family.components.text_encoders.items()
        if any(module.endswith(endings) for module, _ in encoder.named_modules())
    ]
