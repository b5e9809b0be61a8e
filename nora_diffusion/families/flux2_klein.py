"""Flux.2 klein (flow): transformer over tokens of image and prompt.

The prompt is read by middle layers of Qwen3; the autoencoder normalises its patches by statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad, pixel_unshuffle

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
from nora_diffusion.families.tokens import PATCH, grid_positions

TOKENS = 512
"""Tokens of a prompt."""

TEXT_LAYERS = (9, 18, 27)
"""Layers of Qwen3 whose states the transformer reads side by side."""


class Flux2Klein:
    """A loaded Flux.2 klein; see ``base.Family`` for the members."""

    name: ClassVar[str] = "flux2_klein"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            # Of the single blocks, whose attention and feed-forward are one layer each way; the
            # second by its full name, as "to_out" is a list of layers in the other blocks.
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48)),
        ),
        "feed_forward": (
            *("ff.linear_in", "ff.linear_out"),
            *("ff_context.linear_in", "ff_context.linear_out"),
        ),
        "convolution": (),
    }
    text_targets: ClassVar[tuple[str, ...]] = ()  # no program has a LoRA for its text encoder

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the shift of sigmas is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        self.distilled = bool(pipe.config.is_distilled)
        self.num_timesteps = 1  # the transformer is given sigma itself
        self.resolution_px = int(pipe.vae.config.sample_size)
        self.size_multiple_px = int(pipe.vae_scale_factor * PATCH)
        kind = "distilled to few steps" if self.distilled else "base"
        self.summary = f"flow, {kind}, {self.resolution_px} px"

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

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 128, H/16, W/16) float32 latents: normalised patches."""
        pipe = self.components.pipeline
        encoding.check_size(pixels, self.size_multiple_px)
        patches = pixel_unshuffle(encoding.encode_images(pipe.vae, pixels), PATCH)
        norm = pipe.vae.bn
        mean, variance = norm.running_mean.float(), norm.running_var.float()
        std = (variance + pipe.vae.config.batch_norm_eps).sqrt()
        return (patches - mean[:, None, None]) / std[:, None, None]

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to (B, S, 3 D): three layers of Qwen3 side by side, padding included."""
        pipe = self.components.pipeline
        texts = encoding.as_chat(pipe.tokenizer, prompts, thinking=False)
        states, _ = encoding.layer_states(
            pipe.tokenizer, pipe.text_encoder, texts, TOKENS, TEXT_LAYERS
        )
        return Conditioning(torch.cat(states, dim=-1))

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
        """(B,) loss of each sample; see ``base.Family`` and ``flow.flow_loss``.

        The pipeline shifts sigmas further the fewer steps it takes; here it is the scheduler's own
        shift, to which that comes down with many steps.
        """
        parts = self.components
        shift = scheduler_shift(parts.pipeline.scheduler.config, latents[0, 0].numel())
        return flow_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            shift, parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        embeds = conditioning.prompt_embeds.to(self.components.dtype)

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            # Positions are (0, row, column, place in the text).
            height, width = noisy.shape[-2:]
            places = torch.arange(embeds.shape[1], device=noisy.device).float()
            tokens = denoiser(
                noisy.flatten(2).transpose(1, 2), encoder_hidden_states=embeds, timestep=sigmas,
                img_ids=pad(grid_positions(height, width, noisy.device), (0, 1)),
                txt_ids=pad(places[:, None], (3, 0)), return_dict=False,
            )[0]  # fmt: skip
            return tokens.transpose(1, 2).unflatten(2, (height, width))

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
        """B images by the base's own scheduler; ``guidance`` 1 leaves ``negative`` unused.

        The distilled models take no guidance, so it is 1 for them.

        Raises:
            ValueError: when the denoiser answers NaN or infinity.
        """
        dtype = self.components.dtype
        return encoding.draw_images(
            self.components.pipeline, seeds, steps=steps,
            guidance=1.0 if self.distilled else guidance, width_px=width_px, height_px=height_px,
            prompt_embeds=conditioning.prompt_embeds.to(dtype),
            negative_prompt_embeds=negative.prompt_embeds.to(dtype),
        )  # fmt: skip


FAMILY = Flux2Klein
