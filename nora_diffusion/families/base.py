"""What a model family has to offer, and the names and shapes all families share.

A family is one file that knows how one kind of base model is loaded, encoded for, trained against
and sampled from. It knows nothing of adapters: it is handed a denoiser and calls it.

    pixels        (B, 3, H, W)   float32 in [-1, 1]
    latents       (B, C, h, w)   float32, scaled as the denoiser expects them
    conditioning  Conditioning   what the prompts say, batch first
    generator     torch.Generator on the CPU, so that the same seed gives the same noise anywhere
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from nora_diffusion.config import UserError
from nora_diffusion.families.objective import LossOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DEFAULT_OPTIONS = LossOptions()

Denoiser = Callable[..., Any]
"""``denoiser(noisy_latents, timesteps, **conditioning)``: a module, or a function around one."""


@dataclass(frozen=True)
class Conditioning:
    """Prompts as the denoiser reads them.

    Attributes:
        prompt_embeds: (B, S, D).
        extra: further tensors of the family by name, batch first (pooled embeddings, ...).
    """

    prompt_embeds: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The prompts of all parts, in order."""
        extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
        return Conditioning(torch.cat([part.prompt_embeds for part in parts]), extra)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to every tensor."""
        extra = {name: function(tensor) for name, tensor in self.extra.items()}
        return Conditioning(function(self.prompt_embeds), extra)

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The prompts at these positions, in this order; repetitions allowed."""
        index = torch.as_tensor(indices, device=self.prompt_embeds.device)
        return self.apply(lambda tensor: tensor.index_select(0, index))

    def repeat(self, times: int) -> Conditioning:
        """Every prompt ``times`` times in a row."""
        return self.apply(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move, and cast the floating-point tensors."""
        return self.apply(
            lambda tensor: tensor.to(
                device=device, dtype=dtype if tensor.is_floating_point() else None
            )
        )


@dataclass(frozen=True)
class Framing:
    """How a training picture was cut from its photo, for families that are told (SDXL).

    Attributes:
        original_px: height and width of the photo.
        crop_px: top and left of what was cut out, after scaling to the training resolution.
        target_px: height and width of the training picture.
    """

    original_px: tuple[int, int]
    crop_px: tuple[int, int]
    target_px: tuple[int, int]


@dataclass
class Components:
    """The parts of a loaded base model.

    Attributes:
        base: what it was loaded from, as the user gave it.
        pipeline: the diffusers pipeline that holds the parts.
        denoiser_name: name of the denoiser in the pipeline ("unet", "transformer").
        text_encoder_names: names of the text encoders in the pipeline.
        device: where denoiser and text encoders are.
        dtype: number format of denoiser and text encoders; the autoencoder stays float32.
        staged: the parts wait on the CPU, and come to the device when ``placed`` or ``place_rest``
            brings them.
        offloaded: the denoiser stays on the CPU, and its layers come to the device one by one, or
            its parts to several devices.
    """

    base: str
    pipeline: Any
    denoiser_name: str
    text_encoder_names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    staged: bool = False
    offloaded: bool = False

    @property
    def denoiser(self) -> nn.Module:
        """The module that predicts from noised latents."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name; those already freed are left out."""
        modules = {name: getattr(self.pipeline, name) for name in self.text_encoder_names}
        return {name: module for name, module in modules.items() if module is not None}

    def stage(self, device: torch.device) -> None:
        """From here on compute on ``device``, to which parts loaded on the CPU come in turn."""
        self.device, self.staged = device, True

    @contextmanager
    def placed(self, *names: str) -> Iterator[None]:
        """These parts, by name, on the device for the time of a ``with`` block."""
        if not self.staged:
            yield
            return
        held = [name for name in names if not (name == self.denoiser_name and self.offloaded)]
        modules = [getattr(self.pipeline, name) for name in held]
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")

    def place_rest(self) -> None:
        """Bring what is left after ``free_...`` to the device for good."""
        if self.staged:
            denoiser = () if self.offloaded else (self.denoiser,)
            for module in (*denoiser, *self.text_encoders.values(), self.pipeline.vae):
                module.to(self.device)
            self.staged = False

    def free_text_encoders(self) -> None:
        """Drop the text encoders; prompts must have been encoded before."""
        for name in self.text_encoder_names:
            setattr(self.pipeline, name, None)

    def free_image_encoder(self) -> None:
        """Drop the autoencoder's encoding half; decoding still works."""
        self.pipeline.vae.encoder = None


class Family(Protocol):
    """A loaded base model of one family.

    Attributes:
        name: name of the family in ``families.FAMILIES``.
        targets: module-name endings in the denoiser for each of ``adapter.targets``.
        text_targets: module-name endings in the text encoders; an encoder without any of them
            gets no adapter.
        components: the loaded parts.
        resolution_px: side of the images the base was trained on.
        size_multiple_px: what sides of pictures must be multiples of.
        num_timesteps: T; timesteps run from 0 to T-1.
        summary: what the base predicts, in words for logs and model cards.
    """

    name: ClassVar[str]
    targets: ClassVar[Mapping[str, tuple[str, ...]]]
    text_targets: ClassVar[tuple[str, ...]]
    components: Components
    resolution_px: int
    size_multiple_px: int
    num_timesteps: int
    summary: str

    @classmethod
    def load(
        cls, base: str | Path, *, dtype: torch.dtype, device: torch.device, **kwargs: Any
    ) -> Self:
        """Load a base model, frozen and in evaluation mode."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, C, h, w) latents."""
        ...

    def encode_prompts(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """B prompts to their conditioning; differentiable where the text encoders train.

        With ``negative`` they say what a picture should not show, as the base's pipeline reads it.
        """
        ...

    def frame(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """The conditioning with what the family is told of sizes and crops; most: none."""
        ...

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
        """(B,) loss of each sample at its own random timestep and noise.

        With a ``reference`` the target is what that denoiser predicts under that conditioning, at
        the same timesteps and noise. A ``mask`` (B, 1, h, w) in [0, 1] says how much each place
        counts.
        """
        ...

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
        """One image for each of the B prompts and seeds; an image depends on its own seed only."""
        ...


def resolve_device(name: str, *, mps: bool = True) -> torch.device:
    """The device for "auto" (CUDA, then MPS, then CPU) or a given name.

    Args:
        name: as in ``model.device``.
        mps: False where "auto" shall not be MPS.

    Raises:
        UserError: when the machine lacks the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'model.device = "cuda": this machine or this PyTorch build has no CUDA device; '
            'use "auto" or "cpu"'
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError('model.device = "mps": not available here; use "auto" or "cpu"')
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format for "auto" (bf16 where the GPU has it, else fp32) or a given name."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32
