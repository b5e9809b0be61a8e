"""Stable Diffusion XL (ε and v): UNet, CLIP-L and OpenCLIP-G, told of sizes and crops, and VAE."""

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
from nora_diffusion.families.sd import StableDiffusion


class StableDiffusionXL:
    """A loaded Stable Diffusion XL; see ``base.Family`` for the members."""

    name: ClassVar[str] = "sdxl"
    targets: ClassVar[dict[str, tuple[str, ...]]] = StableDiffusion.targets
    text_targets: ClassVar[tuple[str, ...]] = StableDiffusion.text_targets

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the noise schedule is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        schedule = noise_schedule(pipe.scheduler, components.base)
        self.alphas_cumprod, self.prediction_type = schedule
        self.num_timesteps = len(self.alphas_cumprod)
        self.latent_px = int(pipe.vae_scale_factor)
        self.resolution_px = int(pipe.unet.config.sample_size * self.latent_px)
        self.size_multiple_px = unet_multiple(pipe)
        self.summary = f"{self.prediction_type}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of a folder, hub id or single file, on the CPU."""
        if isinstance(source, Path) and source.is_file():
            from nora_diffusion.families.single_file import load_single_file_xl

            return load_single_file_xl(source, **kwargs)
        return pretrained(source, **kwargs)

    @classmethod
    def load(
        cls, base: str | Path, *, dtype: torch.dtype, device: torch.device, **kwargs: Any
    ) -> Self:
        """Load, freeze, and move to the device; the autoencoder stays float32."""
        if not (isinstance(base, Path) and base.is_file()):
            kwargs.setdefault("dtype", part_dtypes(dtype))
            kwargs.setdefault("add_watermarker", False)
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
        """B prompts to the states of both encoders (B, S, D) and the second's pooled (B, P).

        An empty negative prompt is zeros where the pipeline's ``force_zeros_for_empty_prompt`` says
        so, as XL's does: by that the base was trained to draw without a prompt.
        """
        pipe = self.components.pipeline
        first, _ = encoding.clip_states(pipe.tokenizer, pipe.text_encoder, prompts)
        second, pooled = encoding.clip_states(pipe.tokenizer_2, pipe.text_encoder_2, prompts)
        encoded = Conditioning(torch.cat([first, second], dim=-1), {"pooled": pooled})
        if negative and not any(prompts) and pipe.config.force_zeros_for_empty_prompt:
            return encoded.apply(torch.zeros_like)
        return encoded

    def frame(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """The conditioning with size of photo, crop and size of picture as ``time_ids`` (B, 6).

        Podell et al. 2023 (arXiv 2307.01952), section 2.2.
        """
        ids = torch.tensor(
            [[*cut.original_px, *cut.crop_px, *cut.target_px] for cut in framings],
            dtype=torch.float32,
            device=conditioning.prompt_embeds.device,
        )
        return Conditioning(conditioning.prompt_embeds, {**conditioning.extra, "time_ids": ids})

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
        """(B,) loss of each sample; see ``base.Family`` and ``diffusion.diffusion_loss``.

        A conditioning without ``time_ids`` is taken for a picture that was not cut.
        """
        parts = self.components
        return diffusion_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            self.alphas_cumprod, self.prediction_type, parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        dtype = self.components.dtype
        embeds, pooled = conditioning.prompt_embeds.to(dtype), conditioning.extra["pooled"]
        told = conditioning.extra.get("time_ids")

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            side = [length * self.latent_px for length in noisy.shape[-2:]]
            uncut = noisy.new_tensor([*side, 0, 0, *side], dtype=torch.float32)
            time_ids = uncut.expand(len(noisy), -1) if told is None else told
            # In float32: from 257 on, bfloat16 has not every number of pixels.
            added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
            return denoiser(
                noisy, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added,
                return_dict=False,
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

        The base is told of an uncut picture of the size drawn.

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


FAMILY = StableDiffusionXL
