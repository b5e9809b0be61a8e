"""Stable Diffusion 1.x and 2.x (ε and v), and the built-in mini: UNet, CLIP text encoder, VAE."""

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
from nora_diffusion.families.diffusion import (
    Predict,
    diffusion_loss,
    noise_schedule,
    unet_multiple,
)
from nora_diffusion.families.loading import frozen_parts, part_dtypes, pretrained
from nora_diffusion.families.objective import LossOptions


class StableDiffusion:
    """A loaded Stable Diffusion; see ``base.Family`` for the members."""

    name: ClassVar[str] = "sd"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed_forward": ("ff.net.0.proj", "ff.net.2"),
        "convolution": ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"),
    }
    text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the noise schedule is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        schedule = noise_schedule(pipe.scheduler, components.base)
        self.alphas_cumprod, self.prediction_type = schedule
        self.num_timesteps = len(self.alphas_cumprod)
        self.resolution_px = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        self.size_multiple_px = unet_multiple(pipe)
        self.summary = f"{self.prediction_type}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of a folder, hub id or single file, on the CPU."""
        if isinstance(source, Path) and source.is_file():
            from nora_diffusion.families.single_file import load_single_file

            return load_single_file(source, **kwargs)
        return pretrained(source, **kwargs)

    @classmethod
    def load(
        cls, base: str | Path, *, dtype: torch.dtype, device: torch.device, **kwargs: Any
    ) -> Self:
        """Load, freeze, and move to the device; the autoencoder stays float32."""
        if not (isinstance(base, Path) and base.is_file()):
            kwargs.setdefault("safety_checker", None)
            kwargs.setdefault("requires_safety_checker", False)
            kwargs.setdefault("dtype", part_dtypes(dtype))
        pipe = cls.load_pipeline(base, **kwargs)
        return cls.from_pipeline(pipe, base=str(base), dtype=dtype, device=device)

    @classmethod
    def from_pipeline(
        cls, pipe: Any, *, base: str, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """Freeze the parts of a pipeline and bring them to device and number format."""
        parts = frozen_parts(pipe, base, "unet", dtype=dtype, device=device)
        if device.type != "mps":  # convolutions are faster so, on CPUs and tensor cores alike
            pipe.unet.to(memory_format=torch.channels_last)
        return cls(parts)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, C, H/f, W/f) float32 latents."""
        return encoding.encode_images(self.components.pipeline.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to (B, S, D); S is the tokenizer's full length, as in training the base."""
        pipe, device = self.components.pipeline, self.components.device
        ids, mask = encoding.tokenize(pipe.tokenizer, prompts)
        uses_mask = getattr(pipe.text_encoder.config, "use_attention_mask", False)
        shown = mask.to(device) if uses_mask else None
        return Conditioning(pipe.text_encoder(ids.to(device), attention_mask=shown)[0])

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
        """(B,) loss of each sample; see ``base.Family`` and ``diffusion.diffusion_loss``."""
        parts = self.components
        return diffusion_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            self.alphas_cumprod, self.prediction_type, parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        embeds = conditioning.prompt_embeds.to(self.components.dtype)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return denoiser(noisy, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]

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
            negative_prompt_embeds=negative.prompt_embeds.to(dtype),
        )  # fmt: skip


FAMILY = StableDiffusion
