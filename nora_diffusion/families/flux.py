"""Flux.1 dev and schnell (flow): transformer over tokens of image and T5, told CLIP's summary.

dev is distilled from guidance, whose scale is an input of its transformer; schnell has no such
input and few steps.
"""

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
from nora_diffusion.families.tokens import PATCH, grid_positions, pack, unpack

T5_TOKENS = {"dev": 512, "schnell": 256}
"""Tokens of a prompt that T5 reads, as each base was trained."""

TRAINING_GUIDANCE = 1.0
"""Guidance scale told to dev in training. The target is the unguided velocity, which dev predicts
at 1; at the 3.5 of sampling the adapter would first have to unlearn the guidance."""


class Flux:
    """A loaded Flux.1; see ``base.Family`` for the members."""

    name: ClassVar[str] = "flux"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        ),
        "feed_forward": (
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            "proj_mlp",
            # Of the single blocks, by their numbers: the last layer of all is a "proj_out" too.
            *(f"{block}.proj_out" for block in range(38)),
        ),
        "convolution": (),
    }
    # Of CLIP; no program has a LoRA for the T5 of Flux.1.
    text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the shift of sigmas is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        self.guided = bool(pipe.transformer.config.guidance_embeds)
        self.num_timesteps = 1  # the transformer is given sigma itself
        self.resolution_px = int(pipe.vae.config.sample_size)
        self.size_multiple_px = int(pipe.vae_scale_factor * PATCH)
        self.summary = f"flow, {'dev' if self.guided else 'schnell'}, {self.resolution_px} px"

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
        """B prompts to T5's states (B, S, D), and CLIP's summary of each, (B, P)."""
        pipe = self.components.pipeline
        _, pooled = encoding.clip_states(pipe.tokenizer, pipe.text_encoder, prompts)
        length = T5_TOKENS["dev" if self.guided else "schnell"]
        states, _ = encoding.t5_states(pipe.tokenizer_2, pipe.text_encoder_2, prompts, length)
        return Conditioning(states, {"pooled": pooled})

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
        dtype = self.components.dtype
        embeds = conditioning.prompt_embeds.to(dtype)
        pooled = conditioning.extra["pooled"].to(dtype)

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            height, width = noisy.shape[-2:]
            guidance = torch.full_like(sigmas, TRAINING_GUIDANCE) if self.guided else None
            tokens = denoiser(
                pack(noisy), encoder_hidden_states=embeds, pooled_projections=pooled,
                timestep=sigmas, guidance=guidance, txt_ids=sigmas.new_zeros(embeds.shape[1], 3),
                img_ids=grid_positions(height // PATCH, width // PATCH, noisy.device),
                return_dict=False,
            )[0]  # fmt: skip
            return unpack(tokens, height, width)

        return predict

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
        """B images by the base's own scheduler.

        ``guidance`` is the scale that dev is told; schnell takes none. Neither uses ``negative``.

        Raises:
            ValueError: when the denoiser answers NaN or infinity.
        """
        pipe, dtype = self.components.pipeline, self.components.dtype
        tokens = encoding.draw_latents(
            pipe, seeds, steps=steps, guidance=guidance, width_px=width_px, height_px=height_px,
            prompt_embeds=conditioning.prompt_embeds.to(dtype),
            pooled_prompt_embeds=conditioning.extra["pooled"].to(dtype),
        )  # fmt: skip
        sides = (side // (pipe.vae_scale_factor * PATCH) * PATCH for side in (height_px, width_px))
        return encoding.decode_images(pipe, unpack(tokens, *sides))


FAMILY = Flux
