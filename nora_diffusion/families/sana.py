"""Sana (flow): a linear-attention transformer on 32x latents, told of the prompt by Gemma 2."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
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
from nora_diffusion.families.flow import Predict, flow_loss
from nora_diffusion.families.loading import frozen_parts, part_dtypes, pretrained
from nora_diffusion.families.objective import LossOptions

PROMPT_TOKENS = 300
"""States of a prompt that the base reads: the first token's and those of the last 299."""

INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
"""What comes before every prompt, as the pipeline has it (Xie et al. 2024, arXiv 2410.10629)."""


class Sana:
    """A loaded Sana; see ``base.Family`` for the members."""

    name: ClassVar[str] = "sana"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        # Its depthwise convolution has a 3x3 matrix a channel, which has no rank to lower.
        "feed_forward": ("ff.conv_inverted", "ff.conv_point"),
        "convolution": ("patch_embed.proj",),
    }
    text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the shift of sigmas is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        schedule, shape = pipe.scheduler.config, pipe.transformer.config
        # Of the public checkpoints' DPM-Solver, or of a flow-matching Euler scheduler.
        self.shift = float(schedule.get("flow_shift", schedule.get("shift", 1.0)))
        self.num_timesteps = round(schedule.num_train_timesteps * shape.timestep_scale)
        self.resolution_px = int(shape.sample_size * pipe.vae_scale_factor)
        self.size_multiple_px = int(shape.patch_size * pipe.vae_scale_factor)
        self.summary = f"flow, shift {self.shift:g}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of a folder or hub id, on the CPU."""
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
        pipe.tokenizer.padding_side = "right"  # the checkpoints' own setting is for generation
        return cls(frozen_parts(pipe, base, "transformer", dtype=dtype, device=device))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 32, H/32, W/32) float32 latents."""
        encoding.check_size(pixels, self.size_multiple_px)
        return encoding.encode_images(self.components.pipeline.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to (B, 300, D) and their mask (B, 300); in lower case, as in training.

        Every prompt follows the instruction but negative ones and the empty one, by which the base
        was trained to draw without a prompt.
        """
        texts = [prompt.lower().strip() for prompt in prompts]
        return Conditioning.cat([self._encode(text, bool(text) and not negative) for text in texts])

    def _encode(self, prompt: str, instructed: bool) -> Conditioning:
        pipe, device = self.components.pipeline, self.components.device
        before = INSTRUCTION if instructed else ""
        # As the pipeline counts: the first token twice, and one for where the texts meet.
        told = len(pipe.tokenizer(before).input_ids) - 2 if before else 0
        ids, mask = encoding.tokenize(pipe.tokenizer, [before + prompt], told + PROMPT_TOKENS)
        ids, mask = ids.to(device), mask.to(device)
        states = pipe.text_encoder(ids, attention_mask=mask).last_hidden_state
        read = [0, *range(-PROMPT_TOKENS + 1, 0)]
        return Conditioning(states[:, read], {"prompt_attention_mask": mask[:, read]})

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
        return flow_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            self.shift, parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        embeds = conditioning.prompt_embeds.to(self.components.dtype)
        shown = conditioning.extra["prompt_attention_mask"]

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            return denoiser(
                noisy, encoder_hidden_states=embeds, encoder_attention_mask=shown,
                timestep=sigmas * self.num_timesteps, return_dict=False,
            )[0]  # fmt: skip

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

        Raises:
            ValueError: when the denoiser answers NaN or infinity.
        """
        pipe, dtype = self.components.pipeline, self.components.dtype
        return encoding.draw_images(
            pipe, seeds, steps=steps, guidance=guidance, width_px=width_px, height_px=height_px,
            prompt_embeds=conditioning.prompt_embeds.to(dtype),
            prompt_attention_mask=conditioning.extra["prompt_attention_mask"],
            negative_prompt=None,  # its default, "", would count as given twice
            negative_prompt_embeds=negative.prompt_embeds.to(dtype),
            negative_prompt_attention_mask=negative.extra["prompt_attention_mask"],
            use_resolution_binning=False,  # it would draw another size and resize the picture
        )  # fmt: skip


FAMILY = Sana
