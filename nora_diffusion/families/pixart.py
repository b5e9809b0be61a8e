"""PixArt-Sigma (ε): a transformer with cross-attention on T5, and SDXL's VAE."""

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
from nora_diffusion.families.diffusion import Predict, diffusion_loss, noise_schedule
from nora_diffusion.families.loading import frozen_parts, part_dtypes, pretrained
from nora_diffusion.families.objective import LossOptions

PROMPT_TOKENS = 300
"""Tokens of a prompt that the base reads (Chen et al. 2024, arXiv 2403.04692, sec. 3.1)."""

# The pipeline passes these too: only the first PixArt was told the size of the picture.
_SIZES = {"resolution": None, "aspect_ratio": None}


class PixArt:
    """A loaded PixArt-Sigma; see ``base.Family`` for the members."""

    name: ClassVar[str] = "pixart"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed_forward": ("ff.net.0.proj", "ff.net.2"),
        "convolution": ("pos_embed.proj",),
    }
    text_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")

    def __init__(self, components: Components) -> None:
        """Wrap loaded parts; the noise schedule is taken from the pipeline's scheduler."""
        self.components = components
        pipe = components.pipeline
        schedule = noise_schedule(pipe.scheduler, components.base)
        self.alphas_cumprod, self.prediction_type = schedule
        self.num_timesteps = len(self.alphas_cumprod)
        self.resolution_px = int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)
        self.size_multiple_px = int(pipe.transformer.config.patch_size * pipe.vae_scale_factor)
        self.summary = f"{self.prediction_type}, {self.resolution_px} px"

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
        return cls(frozen_parts(pipe, base, "transformer", dtype=dtype, device=device))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 4, H/8, W/8) float32 latents."""
        encoding.check_size(pixels, self.size_multiple_px)
        return encoding.encode_images(self.components.pipeline.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to (B, 300, D) and their mask (B, 300); in lower case, as in training."""
        pipe = self.components.pipeline
        texts = [prompt.lower().strip() for prompt in prompts]
        embeds, mask = encoding.t5_states(
            pipe.tokenizer, pipe.text_encoder, texts, PROMPT_TOKENS, masked=True
        )
        return Conditioning(embeds, {"prompt_attention_mask": mask})

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
        """(B,) loss of each sample; see ``base.Family`` and ``diffusion.diffusion_loss``.

        The denoiser also answers a variance, which the base's samplers do not read: it is left out.
        """
        parts = self.components
        return diffusion_loss(
            self._predict(denoiser, conditioning), latents, generator, options,
            self.alphas_cumprod, self.prediction_type, parts.device, parts.dtype,
            None if reference is None else self._predict(*reference), mask,
        )  # fmt: skip

    def _predict(self, denoiser: Denoiser, conditioning: Conditioning) -> Predict:
        embeds = conditioning.prompt_embeds.to(self.components.dtype)
        shown = conditioning.extra["prompt_attention_mask"]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            answer = denoiser(
                noisy, encoder_hidden_states=embeds, encoder_attention_mask=shown,
                timestep=timesteps, added_cond_kwargs=_SIZES, return_dict=False,
            )[0]  # fmt: skip
            return answer[:, : noisy.shape[1]]

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


FAMILY = PixArt
