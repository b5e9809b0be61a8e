"""What a run will need of the accelerator's memory, before anything is loaded.

The steps of the recipe are run on the meta device: the base's real config, the adapter's real
layers, the family's own loss, autograd's own saved tensors. Nothing is fitted to measurements; what
is not counted is said in ``MemoryPlan.lines``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nora_diffusion.adapter import deferred_factors, iter_nora_layers
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.data.dataset import class_prompt
from nora_diffusion.families.base import (
    Conditioning,
    Family,
    Framing,
    resolve_device,
    resolve_dtype,
)
from nora_diffusion.families.skeleton import META, skeleton, tensors_of
from nora_diffusion.train import adapters
from nora_diffusion.train.common import loss_options
from nora_diffusion.train.live_memory import LiveMemory, bytes_of
from nora_diffusion.train.optimizers import optimizer_bytes

Result = TypeVar("Result")

GIGABYTE = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes by part.

    Attributes:
        weights: frozen models that are there while training.
        outer_factors: the adapters' frozen pairs.
        trained: inner pairs with gradient, optimiser state and moving average.
        activations: most that forward and backward hold at once, on top of the rest.
        cache: encoded pictures and prompts.
        encoding: the most that is there while pictures and prompts are encoded.
    """

    weights: int
    outer_factors: int
    trained: int
    activations: int
    cache: int
    encoding: int

    @property
    def training(self) -> int:
        """Peak while training."""
        return self.weights + self.outer_factors + self.trained + self.activations + self.cache

    @property
    def peak(self) -> int:
        """Peak of the run."""
        return max(self.training, self.encoding)

    def lines(self) -> list[str]:
        """A table for people, in GB of 10^9 bytes."""
        parts = {
            "weights": self.weights,
            "outer factors": self.outer_factors,
            "inner pairs + optimiser": self.trained,
            "activations": self.activations,
            "cache": self.cache,
        }
        width = max(map(len, parts))
        return [
            f"predicted memory: {_gb(self.peak)} at the peak"
            + (" (while encoding)" if self.encoding > self.training else ""),
            *(f"  {name:{width}}  {_gb(size):>9}" for name, size in parts.items()),
            f"  {'while encoding':{width}}  {_gb(self.encoding):>9}",
            "  not counted: the driver's own share (0.3 to 0.6 GB on CUDA), convolution workspaces "
            "and fragmentation",
        ]


def _gb(size: int) -> str:
    return f"{size / GIGABYTE:.3f} GB" if abs(size) < GIGABYTE else f"{size / GIGABYTE:.2f} GB"


def plan_memory(cfg: DreamboothConfig, pictures: int = 1) -> MemoryPlan:
    """Predict the memory of a run from its config and the base's config alone.

    Args:
        cfg: the settings.
        pictures: how many pictures are encoded and kept.

    Raises:
        UserError: when the base's configs cannot be had, or a setting does not fit the base.
    """
    dtype = resolve_dtype(cfg.model.dtype, resolve_device(cfg.model.device))
    family = skeleton(cfg.model.base, dtype)
    parts = family.components
    side = cfg.data.resolution_px or family.resolution_px
    everything = _present(family)
    with torch.no_grad():
        pixels = torch.empty(1, 3, side, side, device=META)
        of_picture, latents = _held(everything, lambda: family.encode_images(pixels))
        of_prompt, conditioning = _held(everything, lambda: _conditioning(cfg, family, 1))
    encoding = bytes_of(everything) + max(of_picture, of_prompt)

    parts.free_image_encoder()
    if not cfg.text_encoder.train:
        parts.free_text_encoders()
    weights = bytes_of(_present(family))
    models = adapters.adapted_models(cfg, family)
    _add_adapters(cfg, family, models)
    inner = adapters.trained_parameters(models)
    copies = 2 + (cfg.train.ema_decay is not None)  # itself, its gradient, ...
    prompts = len(cfg.sample.prompts) + 3  # the subject's, the class's and the negative one
    return MemoryPlan(
        weights=weights,
        outer_factors=bytes_of(t for model in models.values() for t in _outer(model)),
        trained=copies * bytes_of(inner.values()) + optimizer_bytes(cfg, inner),
        activations=_activations(cfg, family, models, latents, conditioning),
        cache=pictures * bytes_of([latents]) + prompts * bytes_of(tensors_of(conditioning)),
        encoding=encoding,
    )


def check_memory(cfg: DreamboothConfig, plan: MemoryPlan, available: int) -> None:
    """Refuse a run that cannot fit, and say what would make it fit.

    Args:
        cfg: the settings.
        plan: of these settings.
        available: bytes the device has free.

    Raises:
        UserError: when the plan's peak is above ``available``; each change named was planned too.
    """
    if plan.peak <= available:
        return
    offers = [
        f"{change}: {_gb(other.peak - plan.peak)}"
        + (", which fits" if other.peak <= available else "")
        for change, changed in _savings(cfg)
        if (other := plan_memory(changed)).peak < plan.peak
    ]
    cures = "".join(f"\n  {offer}" for offer in offers) or "\n  no setting here saves any of it"
    raise UserError(
        f"this run needs {_gb(plan.peak)} and the device has {_gb(available)} free; what each "
        f"change would save:{cures}"
    )


def _savings(cfg: DreamboothConfig) -> Iterator[tuple[str, DreamboothConfig]]:
    """Settings that may need less memory than these, and how a user writes them."""

    def changed(section: str, **values: Any) -> DreamboothConfig:
        part = getattr(cfg, section).model_copy(update=values)
        return cfg.model_copy(update={section: part})

    if not cfg.train.gradient_checkpointing:
        change = "train.gradient_checkpointing = true"
        yield change, changed("train", gradient_checkpointing=True)
    if cfg.train.batch_size > 1:
        change = "train.batch_size = 1"
        yield change, changed("train", batch_size=1)
    if cfg.text_encoder.train:
        change = "text_encoder.train = false"
        yield change, changed("text_encoder", train=False)
    if resolve_dtype(cfg.model.dtype, resolve_device(cfg.model.device)) == torch.float32:
        yield 'model.dtype = "bf16"', changed("model", dtype="bf16")
    smaller = (cfg.data.resolution_px or 0) * 3 // 4 // 64 * 64
    if smaller >= 256:
        yield f"data.resolution_px = {smaller}", changed("data", resolution_px=smaller)


def _activations(
    cfg: DreamboothConfig,
    family: Family,
    models: dict[str, nn.Module],
    latents: Tensor,
    conditioning: Conditioning,
) -> int:
    """Most bytes that one forward and backward pass holds, the trained gradients aside."""
    if cfg.train.gradient_checkpointing:
        adapters.checkpoint_gradients(models)
    for model in models.values():
        model.train()
    size = cfg.train.batch_size
    batch = latents.expand(size, *latents.shape[1:]).contiguous()
    given = conditioning.repeat(size)

    def step() -> None:
        encoded = _conditioning(cfg, family, size) if cfg.text_encoder.train else given
        generator = torch.Generator().manual_seed(0)
        losses = family.loss(
            family.components.denoiser, batch, encoded, generator, options=loss_options(cfg.train)
        )
        losses.mean().backward()

    held, _ = _held([*_present(family), batch, *tensors_of(given)], step)
    return held - bytes_of(p for p in adapters.trained_parameters(models).values())


def _conditioning(cfg: DreamboothConfig, family: Family, rows: int) -> Conditioning:
    """Of ``rows`` prompts, with the framing of a whole square picture."""
    side = cfg.data.resolution_px or family.resolution_px
    framing = Framing(original_px=(side, side), crop_px=(0, 0), target_px=(side, side))
    encoded = family.encode_prompts([class_prompt(cfg.data.class_name)] * rows)
    return family.frame(encoded, [framing] * rows)


def _held(present: Iterable[Tensor], call: Callable[[], Result]) -> tuple[int, Result]:
    """Most bytes a call held on top of what was present, and its result."""
    with LiveMemory() as memory:
        memory.ignore(present)
        result = call()
    return memory.peak, result


def _add_adapters(cfg: DreamboothConfig, family: Family, models: dict[str, nn.Module]) -> None:
    """Adapters as the run adds them, but with outer factors that have shapes only."""
    with deferred_factors():
        for component, model in models.items():
            denoiser = model is family.components.denoiser
            adapters.add_adapter(
                component, model, adapters.adapter_config(cfg, family, denoiser=denoiser)
            )
    for model in models.values():
        for _, layer in iter_nora_layers(model):
            layer.outer(adapters.NAME).derived = True
            if cfg.adapter.init == "sigma":
                for store, pair in (
                    (layer.nora_initial_A, layer.nora_inner_A),
                    (layer.nora_initial_B, layer.nora_inner_B),
                ):
                    store[adapters.NAME] = torch.empty_like(pair[adapters.NAME], device=META)


def _present(family: Family) -> list[Tensor]:
    """Parameters and buffers of everything that is loaded."""
    parts = family.components
    modules = [parts.pipeline.vae, *parts.text_encoders.values(), parts.denoiser]
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def _outer(model: nn.Module) -> list[Tensor]:
    return [
        tensor
        for _, layer in iter_nora_layers(model)
        for tensor in layer.outer(adapters.NAME).buffers()
    ]
