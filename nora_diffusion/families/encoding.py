"""Prompts and pictures into what a denoiser reads, and latents back into pictures.

Plain functions on one tokenizer, encoder or autoencoder; each family joins what it needs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nora_diffusion.config import UserError


def tokenize(
    tokenizer: Any, prompts: Sequence[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of B prompts, each (B, S), padded to the full length.

    A prompt that is longer is cut, with a warning that says so.

    Args:
        tokenizer: of transformers.
        prompts: the B prompts.
        max_length: S; None: what the tokenizer says.

    Raises:
        UserError: when a prompt is no valid text.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # a byte of the command line that was not UTF-8
            raise UserError(
                f"prompt {prompt!r}: character {error.start + 1} is no valid text; give the prompt "
                "as UTF-8"
            ) from None
    limit = max_length or int(tokenizer.model_max_length)
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    for index in tokens.attention_mask.all(dim=1).nonzero().flatten().tolist():
        length = len(tokenizer(prompts[index], verbose=False).input_ids)
        if length > limit:
            warnings.warn(
                f"prompt of {length} tokens cut to the {limit} that the base model reads: "
                f"...{prompts[index][-200:]!r}",
                stacklevel=2,
            )
    return tokens.input_ids, tokens.attention_mask


def clip_states(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """States (B, S, D) before CLIP's last layer, and its pooled answer (B, P).

    The pooled answer is projected where the encoder has a projection. SDXL and SD 3 read both.
    """
    ids, _ = tokenize(tokenizer, prompts, max_length)
    answer = encoder(ids.to(encoder.device), output_hidden_states=True)
    projected = hasattr(encoder, "text_projection")
    return answer.hidden_states[-2], answer.text_embeds if projected else answer.pooler_output


def t5_states(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], max_length: int, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """States (B, S, D) of a T5 encoder and its attention mask (B, S).

    Args:
        tokenizer: of the encoder.
        encoder: T5.
        prompts: the B prompts.
        max_length: S.
        masked: whether padding is hidden from the encoder: as the base was trained (PixArt: yes,
            SD 3 and Flux: no).
    """
    ids, mask = tokenize(tokenizer, prompts, max_length)
    mask = mask.to(encoder.device)
    answer = encoder(ids.to(encoder.device), attention_mask=mask if masked else None)
    return answer.last_hidden_state, mask


def as_chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """The prompts as what a user says in a chat, for language models as text encoders.

    Args:
        tokenizer: with a chat template.
        prompts: of the user.
        thinking: whether the template leaves room for the model to think before it answers.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]


def layer_states(
    tokenizer: Any, encoder: Any, texts: Sequence[str], max_length: int, layers: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """States (B, S, D) after each of some layers of a language model, and the mask (B, S).

    Args:
        tokenizer: of the model.
        encoder: the model, with or without its head.
        texts: the B texts.
        max_length: S.
        layers: 0 is the embedding.
    """
    ids, mask = tokenize(tokenizer, texts, max_length)
    mask = mask.to(encoder.device)
    body = getattr(encoder, "model", encoder)  # a head would score the whole vocabulary in vain
    answer = body(
        ids.to(encoder.device), attention_mask=mask, output_hidden_states=True, use_cache=False
    )
    return [answer.hidden_states[layer] for layer in layers], mask


def check_size(pixels: Tensor, multiple_px: int, most_px: int | None = None) -> None:
    """Refuse pictures (B, 3, H, W) that a denoiser of patches cannot read.

    Raises:
        UserError: when H or W is no multiple of ``multiple_px``, or above ``most_px``.
    """
    height, width = pixels.shape[-2:]
    if most_px is not None and max(height, width) > most_px:
        raise UserError(
            f"data.resolution_px: this base knows positions up to {most_px} px a side, and these "
            f"pictures are {width} x {height}; give {most_px} or less"
        )
    if height % multiple_px or width % multiple_px:
        raise UserError(
            f"data.resolution_px: this base reads pictures in patches of {multiple_px} x "
            f"{multiple_px} px, and these are {width} x {height}; give a multiple of {multiple_px}"
        )


def save_vae_memory(vae: Any, side_px: int) -> None:
    """Let an autoencoder work in slices, and in overlapping tiles, on pictures above 1024 px.

    Smaller ones are left whole: tiles change a picture slightly where they meet.
    """
    if side_px <= 1024:
        return
    if type(vae).__name__ == "AutoencoderTiny" and vae.config.latent_channels != 4:
        return  # its tiles have room for Stable Diffusion's four channels alone
    for name in ("enable_slicing", "enable_tiling"):
        if hasattr(vae, name):
            getattr(vae, name)()


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to (B, C, H/f, W/f) float32 latents: the mean of the posterior.

    Latents are shifted and scaled as the denoiser expects them.

    Raises:
        ValueError: when the autoencoder answers NaN or infinity.
    """
    answer = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype))
    if hasattr(answer, "latent_dist"):
        latents = answer.latent_dist.mode()
    else:  # autoencoders without a distribution: AutoencoderTiny, AutoencoderDC
        latents = answer.latents if hasattr(answer, "latents") else answer.latent
    latents = (latents.float() - _shift(vae)) * _scale(vae)
    if not torch.isfinite(latents).all():
        raise ValueError("the autoencoder answered NaN or infinity to these images")
    return latents


def draw_images(pipe: Any, seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
    """The images of B seeds by a pipeline; settings as for ``draw_latents``.

    Raises:
        UserError: as ``draw_latents`` and ``decode_images``.
    """
    return decode_images(pipe, draw_latents(pipe, seeds, **settings))


def draw_latents(
    pipe: Any,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    width_px: int,
    height_px: int,
    **conditioning: Any,
) -> Tensor:
    """What a pipeline draws from B seeds, under what ``conditioning`` tells it, not yet decoded.

    Raises:
        UserError: when the base has too few timesteps or cannot draw in this size.
    """
    _check_drawable(pipe, steps, width_px, height_px)
    return pipe(
        generator=generators(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width_px,
        height=height_px,
        output_type="latent",
        **conditioning,
    ).images


def _check_drawable(pipe: Any, steps: int, width_px: int, height_px: int) -> None:
    most = pipe.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"steps = {steps} (--steps): this base has {most}; give 1 to {most}")
    # Whole patches of whole latents (Flux and Z-Image tell them through their image processor),
    # and diffusers' own 8.
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    patch = denoiser.config.get("patch_size") or 1
    multiple = math.lcm(8, pipe.image_processor.config.vae_scale_factor * patch)
    for name, side in (("width", width_px), ("height", height_px)):
        if side < 1 or side % multiple:
            near = max(1, round(side / multiple)) * multiple
            raise UserError(
                f"{name} = {side} (--{name}): this base draws in steps of {multiple} px; give a "
                f"multiple of {multiple}, such as {near}"
            )


@torch.no_grad()
def decode_images(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """The images of B latents as a sampler left them.

    Raises:
        UserError: when they hold NaN or infinity (else the images would be black).
    """
    if not torch.isfinite(latents).all():
        raise UserError(
            "sampling gave NaN or infinity: use model.dtype (--dtype) fp32 or bf16, a smaller "
            "--weight or --guidance, or an adapter trained with a lower train.learning_rate"
        )
    vae = pipe.vae.to(latents.device)
    latents = latents.to(vae.dtype) / _scale(vae) + _shift(vae)
    images = vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pil")


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that torch does not take.

    Raises:
        UserError: when one has more than 64 bits.
    """
    least, most = -(2**63), 2**64 - 1
    for seed in seeds:
        if not least <= seed <= most:
            raise UserError(f"seed = {seed} (--seed): give {least} to {most}")


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a picture, on the CPU, so that it is the same in any batch on any device.

    Raises:
        UserError: as ``check_seeds``.
    """
    check_seeds(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _scale(vae: Any) -> float:
    return vae.config.get("scaling_factor") or 1.0  # that of Flux.2 has statistics in its place


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0
