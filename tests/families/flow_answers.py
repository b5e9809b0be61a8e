"""What the public pipelines of Flux.1, Flux.2 klein and Z-Image hand to their denoisers.

Packing, positions and prompts are made by the pipelines' own code, for comparison with ours.
"""

from __future__ import annotations

import math

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from torch.nn.utils.rnn import pad_sequence

from nora_diffusion.families.base import Conditioning

FLUX_SHIFT = math.exp(0.5 + (16 - 256) / (4096 - 256) * (1.15 - 0.5))
"""Base and maximum shift are 0.5 and 1.15 at 256 and 4096 tokens; the tiny models have 16."""


def flux(denoiser, noisy, at, conditioning):
    size, channels, height, width = noisy.shape
    states = conditioning.prompt_embeds
    answer = denoiser(
        hidden_states=FluxPipeline._pack_latents(noisy, size, channels, height, width),
        timestep=at.float(),
        guidance=torch.ones(size) if denoiser.config.guidance_embeds else None,
        encoder_hidden_states=states,
        pooled_projections=conditioning.extra["pooled"],
        img_ids=FluxPipeline._prepare_latent_image_ids(
            size, height // 2, width // 2, "cpu", torch.float32
        ),
        txt_ids=torch.zeros(states.shape[1], 3),
    ).sample
    return FluxPipeline._unpack_latents(answer, height, width, vae_scale_factor=1)


def flux2_klein(denoiser, noisy, at, conditioning):
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    answer = denoiser(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy),
        timestep=at.float(),
        encoder_hidden_states=conditioning.prompt_embeds,
        img_ids=ids,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(conditioning.prompt_embeds),
    ).sample
    return Flux2KleinPipeline._unpack_latents_with_ids(answer, ids)


def z_image(denoiser, noisy, at, conditioning):
    masks = conditioning.extra["mask"]
    prompts = [states[mask] for states, mask in zip(conditioning.prompt_embeds, masks, strict=True)]
    pictures = [picture[:, None] for picture in noisy]
    answer = denoiser(pictures, 1 - at.float(), prompts).sample
    return -torch.stack([picture[:, 0] for picture in answer])


def encode_flux(pipe, prompts):
    length = 512 if pipe.transformer.config.guidance_embeds else 256
    states, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=length)
    return Conditioning(states, {"pooled": pooled})


def encode_flux2_klein(pipe, prompts):
    return Conditioning(pipe.encode_prompt(prompts)[0])


def encode_z_image(pipe, prompts):
    states, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    length = torch.tensor([len(prompt) for prompt in states])
    whole = pad_sequence([*states, torch.zeros(512, states[0].shape[1])], batch_first=True)
    return Conditioning(whole[:-1], {"mask": torch.arange(512) < length[:, None]})
