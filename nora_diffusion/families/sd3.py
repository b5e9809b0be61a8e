"""Stable Diffusion 3 and 3.5 (flow): MMDiT, told of the prompt by CLIP-L, CLIP-G and perhaps T5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

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

T5_TOKENS = 256
"""Tokens of a prompt that T5 reads, as the pipeline has it; the CLIPs read 77."""


class StableDiffusion3:
    """A loaded Stable Diffusion 3 or 3.5; see ``base.Family`` for the members."""

    name: ClassVar[str] = "sd3"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        ),
        "feed_forward": (
            *("ff.net.0.proj", "ff.net.2"),
            *("ff_context.net.0.proj", "ff_context.net.2"),
        ),
        "convolution": ("pos_embed.proj",),
    }
    # Of the CLIPs; no other program has a LoRA for the T5 of SD 3.
    text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the shift of sigmas is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        self.shift = float(pipe.scheduler.config.shift)
        self.num_timesteps = int(pipe.scheduler.config.num_train_timesteps)
        self.resolution_px = int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)
        self.size_multiple_px = int(pipe.transformer.config.patch_size * pipe.vae_scale_factor)
        self.summary = f"flow, shift {self.shift:g}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of a folder, hub id, or file with the transformer, on the CPU.

        ``text_encoder_3=None`` leaves T5 out.
        """
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
        """(B, 3, H, W) in [-1, 1] to (B, 16, H/8, W/8) float32 latents."""
        most = int(self.components.pipeline.transformer.config.pos_embed_max_size)
        encoding.check_size(pixels, self.size_multiple_px, most * self.size_multiple_px)
        return encoding.encode_images(self.components.pipeline.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to (B, 77 + 256, D) and the pooled answers of both CLIPs, (B, P).

        The CLIPs' states stand side by side in the first tokens, filled up with zeros to the width
        of T5's (Esser et al. 2024, fig. 2). Without T5 its tokens are zeros, which the base knows
        from dropping encoders in training (sec. 5.3.2).
        """
        pipe = self.components.pipeline
        # Both read as many tokens, whatever the second's own tokenizer says.
        length = int(pipe.tokenizer.model_max_length)
        first, pooled = encoding.clip_states(pipe.tokenizer, pipe.text_encoder, prompts, length)
        second, pooled_2 = encoding.clip_states(
            pipe.tokenizer_2, pipe.text_encoder_2, prompts, length
        )
        clip = torch.cat([first, second], dim=-1)
        width = int(pipe.transformer.config.joint_attention_dim)
        if pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(len(prompts), T5_TOKENS, width)
        else:
            t5, _ = encoding.t5_states(pipe.tokenizer_3, pipe.text_encoder_3, prompts, T5_TOKENS)
        states = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return Conditioning(states, {"pooled": torch.cat([pooled, pooled_2], dim=-1)})

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
        dtype = self.components.dtype
        embeds = conditioning.prompt_embeds.to(dtype)
        pooled = conditioning.extra["pooled"].to(dtype)

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            return denoiser(
                noisy, encoder_hidden_states=embeds, pooled_projections=pooled,
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
            pooled_prompt_embeds=conditioning.extra["pooled"].to(dtype),
            negative_prompt_embeds=negative.prompt_embeds.to(dtype),
            negative_pooled_prompt_embeds=negative.extra["pooled"].to(dtype),
        )  # fmt: skip


FAMILY = StableDiffusion3
