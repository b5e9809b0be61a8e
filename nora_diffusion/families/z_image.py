"""Z-Image and Z-Image-Turbo (flow): one stream of image and prompt tokens, the prompt by Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from nora_diffusion.families import encoding
from nora_diffusion.families.base import (
    DEFAULT_OPTIONS,
    Components,
    Conditioning,
    Denoiser,
    Framing,
)
from nora_diffusion.families.flow import Predict, flow_loss, scheduler_shift
from nora_diffusion.families.loading import frozen_parts, part_dtypes, pretrained
from nora_diffusion.families.objective import LossOptions
from nora_diffusion.families.tokens import PATCH

TOKENS = 512
"""Tokens of a prompt; padding is not handed to the transformer."""


class ZImage:
    """A loaded Z-Image; see ``base.Family`` for the members."""

    name: ClassVar[str] = "z_image"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        "convolution": (),
    }
    text_targets: ClassVar[tuple[str, ...]] = ()  # no program has a LoRA for its text encoder

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the shift of sigmas is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        self.num_timesteps = 1  # the transformer is given 1 - sigma
        self.resolution_px = int(pipe.vae.config.sample_size)
        self.size_multiple_px = int(pipe.vae_scale_factor * PATCH)
        self.summary = f"flow, shift {pipe.scheduler.config.shift:g}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of a folder, hub id, or file with the transformer, on the CPU."""
        if isinstance(source, Path) and source.is_file():
            from nora_diffusion.families.transformer_file import load_transformer_file

            return load_transformer_file(source, **kwargs)
        return pretrained(source, **kwargs)

    @classmethod
    def load(
        cls, base: str | Path, *, dtype: torch.dtype, device: torch.device, **kwargs: Any
    ) -> Self:
        """Load, freeze, and move to the device; the autoencoder stays float32."""
        kwargs.setdefault("dtype", part_dtypes(dtype))
        pipe = cls.load_pipeline(base, **kwargs)
        return cls.from_pipeline(pipe, base=str(base), dtype=dtype, device=device)

    @classmethod
    def from_pipeline(
        cls, pipe: Any, *, base: str, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """Freeze the parts of a pipeline and bring them to device and number format."""
        return cls(frozen_parts(pipe, base, "transformer", dtype=dtype, device=device))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 16, H/8, W/8) float32 latents; H and W multiples of 16."""
        pipe = self.components.pipeline
        encoding.check_size(pixels, self.size_multiple_px)
        return encoding.encode_images(pipe.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to the last but one layer's states (B, S, D) and a mask (B, S); padding is 0.

        The prompt is what a user says in a chat, to which the model is about to answer.
        """
        pipe = self.components.pipeline
        texts = encoding.as_chat(pipe.tokenizer, prompts, thinking=True)
        (states,), mask = encoding.layer_states(
            pipe.tokenizer, pipe.text_encoder, texts, TOKENS, (-2,)
        )
        mask = mask.bool()
        return Conditioning(states.masked_fill(~mask[..., None], 0), {"mask": mask})

    def frame(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """The conditioning itself: this family is not told how pictures were cut."""
        return conditioning

    def loss(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        generator: torch.Generator,
        *,
        options: LossOptions = DEFAULT_OPTIONS,
        reference: tuple[Denoiser, Conditioning] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B,) loss of each sample; see ``base.Family`` and ``flow.flow_loss``."""
        parts = self.components
        tokens = latents[0, 0].numel() // PATCH**2
        return flow_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            scheduler_shift(parts.pipeline.scheduler.config, tokens), parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        prompts = self._prompts(conditioning)

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            frames = list(noisy.unsqueeze(2).unbind())  # pictures are films of one frame here
            answer = denoiser(frames, 1 - sigmas, prompts, return_dict=False)[0]
            return -torch.stack(answer).squeeze(2)  # it answers picture minus noise

        return predict

    def _prompts(self, conditioning: Conditioning) -> list[Tensor]:
        """Each prompt's states, without padding."""
        embeds = conditioning.prompt_embeds.to(self.components.dtype)
        if embeds.is_meta:  # without data no length is known: the longest there can be
            return list(embeds)
        rows = zip(embeds, conditioning.extra["mask"], strict=True)
        return [states[mask] for states, mask in rows]

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        width_px: int,
        height_px: int,
    ) -> list[Image.Image]:
        """B images by the base's own scheduler; ``guidance`` 1 leaves ``negative`` unused.

        The pipeline counts from 0 instead of 1: its own scale is one less.

        Raises:
            ValueError: when the denoiser answers NaN or infinity.
        """
        return encoding.draw_images(
            self.components.pipeline, seeds, steps=steps, guidance=max(0.0, guidance - 1),
            width_px=width_px, height_px=height_px,
            prompt_embeds=self._prompts(conditioning),
            negative_prompt_embeds=self._prompts(negative),
        )  # fmt: skip


FAMILY = ZImage
