"""Stable Diffusion 1.x and 2.x (ε and v), and the built-in mini: UNet, CLIP text encoder, VAE."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor

from nora_diffusion.config import UserError
from nora_diffusion.families import objective
from nora_diffusion.families.base import (
    DEFAULT_OPTIONS,
    Components,
    Conditioning,
    Denoiser,
    Framing,
)


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
        self.prediction_type = str(pipe.scheduler.config.prediction_type)
        if self.prediction_type not in objective.PREDICTION_TYPES:
            raise UserError(
                f'model.base = "{components.base}": its scheduler says prediction_type = '
                f'"{self.prediction_type}"; use one of {", ".join(objective.PREDICTION_TYPES)}'
            )
        # A copy: samplers may rescale their own.
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.detach().clone().float()
        self.num_timesteps = len(self.alphas_cumprod)
        self.resolution_px = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        self.summary = f"{self.prediction_type}, {self.resolution_px} px"

    @staticmethod
    def load_pipeline(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
        """The pipeline of a folder, hub id or single file, on the CPU."""
        if isinstance(source, Path) and source.is_file():
            from nora_diffusion.families.single_file import load_single_file

            return load_single_file(source, **kwargs)
        # Left to itself, diffusers reads the UNet in float32, but transformers the text encoder in
        # the dtype of the file, and the two do not work together.
        kwargs.setdefault("dtype", torch.float32)
        return DiffusionPipeline.from_pretrained(str(source), use_safetensors=True, **kwargs)

    @classmethod
    def load(
        cls, base: str | Path, *, dtype: torch.dtype, device: torch.device, **kwargs: Any
    ) -> Self:
        """Load, freeze, and move to the device; the autoencoder stays float32."""
        if not (isinstance(base, Path) and base.is_file()):
            kwargs.setdefault("safety_checker", None)
            kwargs.setdefault("requires_safety_checker", False)
            kwargs.setdefault("dtype", {"default": dtype, "vae": torch.float32})
        pipe = cast(Any, cls.load_pipeline(base, **kwargs))
        return cls.from_pipeline(pipe, base=str(base), dtype=dtype, device=device)

    @classmethod
    def from_pipeline(
        cls, pipe: Any, *, base: str, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """Freeze the parts of a pipeline and bring them to device and number format."""
        pipe.set_progress_bar_config(disable=True)
        dtypes = {"unet": dtype, "text_encoder": dtype, "vae": torch.float32}
        for name, wanted in dtypes.items():
            module = getattr(pipe, name).requires_grad_(False).eval().to(device)
            if module.dtype != wanted:
                module.to(wanted)
        if device.type != "mps":  # convolutions are faster so, on CPUs and tensor cores alike
            pipe.unet.to(memory_format=torch.channels_last)
        parts = Components(base, pipe, "unet", ("text_encoder",), device, dtype)
        return cls(parts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, C, H/f, W/f) float32 latents: the mean of the posterior.

        Raises:
            ValueError: when the autoencoder answers NaN or infinity.
        """
        vae = self.components.pipeline.vae
        posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype))
        tiny = isinstance(vae, AutoencoderTiny)
        latents = posterior.latents if tiny else posterior.latent_dist.mode()
        latents = latents.float() * vae.config.scaling_factor
        if not torch.isfinite(latents).all():
            raise ValueError("the autoencoder answered NaN or infinity to these images")
        return latents

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts to (B, S, D); S is the tokenizer's full length, as in training the base."""
        pipe = self.components.pipeline
        limit = pipe.tokenizer.model_max_length
        tokens = pipe.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        )
        for index in tokens.attention_mask.all(dim=1).nonzero().flatten().tolist():
            length = len(pipe.tokenizer(prompts[index], verbose=False).input_ids)
            if length > limit:
                warnings.warn(
                    f"prompt of {length} tokens cut to the {limit} that the base model reads: "
                    f"{prompts[index]!r}",
                    stacklevel=2,
                )
        uses_mask = getattr(pipe.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.components.device) if uses_mask else None
        ids = tokens.input_ids.to(self.components.device)
        return Conditioning(pipe.text_encoder(ids, attention_mask=mask)[0])

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
        options: objective.LossOptions = DEFAULT_OPTIONS,
        reference: tuple[Denoiser, Conditioning] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B,) mean squared error of each sample's prediction (Ho et al. 2020, eq. 14).

        Timestep and noise of each sample come from ``generator``, which must be on the CPU. With a
        ``reference`` the target is what that denoiser predicts under that conditioning, at the
        same timesteps and noise. ``mask`` is (B, 1, h, w) in [0, 1].
        """
        device, dtype = self.components.device, self.components.dtype
        timesteps = objective.law_timesteps(
            options.timestep_law, len(latents), self.num_timesteps, generator
        )
        noise = objective.draw_noise(latents.shape, generator, options.offset_noise).to(device)
        alpha, sigma = objective.alpha_sigma(self.alphas_cumprod, timesteps, latents.ndim)
        alpha, sigma, latents = alpha.to(device), sigma.to(device), latents.to(device)
        noisy, at = (
            objective.add_noise(latents, noise, alpha, sigma).to(dtype),
            timesteps.to(device),
        )
        if reference is None:
            target = objective.diffusion_target(self.prediction_type, latents, noise, alpha, sigma)
        else:
            with torch.no_grad():
                target = self._predict(reference[0], noisy, at, reference[1])
        prediction = self._predict(denoiser, noisy, at, conditioning)
        loss = objective.mean_per_sample((prediction - target).square(), mask)
        weight = objective.snr_weight(self.alphas_cumprod, timesteps, options, self.prediction_type)
        return loss if weight is None else loss * weight.to(device)

    def _predict(
        self, denoiser: Denoiser, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        embeds = conditioning.prompt_embeds.to(self.components.dtype)
        answer = denoiser(noisy, timesteps, encoder_hidden_states=embeds, return_dict=False)
        return answer[0].float()

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
            ValueError: when the denoiser answers NaN or infinity (else the images would be black).
        """
        pipe, dtype = self.components.pipeline, self.components.dtype
        latents = pipe(
            prompt_embeds=conditioning.prompt_embeds.to(dtype),
            negative_prompt_embeds=negative.prompt_embeds.to(dtype),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width_px,
            height=height_px,
            output_type="latent",
        ).images
        if not torch.isfinite(latents).all():
            raise ValueError(
                "sampling gave NaN or infinity: use model.dtype (--dtype) fp32 or bf16, or an "
                "adapter trained with a lower train.learning_rate"
            )
        vae = pipe.vae.to(self.components.device)
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pipe.image_processor.postprocess(images, output_type="pil")


FAMILY = StableDiffusion
