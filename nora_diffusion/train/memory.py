"""What a run will need of the accelerator's memory, before anything is loaded.

The steps of the recipe are run on the meta device: the base's real config, the adapter's real
layers, the family's own loss, autograd's own saved tensors. Nothing is fitted to measurements; what
is not counted is said in ``MemoryPlan.lines``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nora_diffusion.adapter import deferred_factors, iter_nora_layers
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.data.buckets import Size, closest_bucket
from nora_diffusion.data.dataset import class_prompt
from nora_diffusion.families import quantise
from nora_diffusion.families.base import (
    Conditioning,
    Family,
    Framing,
    resolve_device,
    resolve_dtype,
)
from nora_diffusion.families.encoding import save_vae_memory
from nora_diffusion.families.loading import is_staged
from nora_diffusion.families.skeleton import META, NoConfigsError, skeleton, tensors_of
from nora_diffusion.families.speed import repeated_blocks
from nora_diffusion.train import adapters
from nora_diffusion.train.common import loss_options
from nora_diffusion.train.live_memory import LiveMemory, bytes_of
from nora_diffusion.train.optimizers import optimizer_bytes
from nora_diffusion.train.photos import buckets_of, scene_prompts

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


def plan_memory(
    cfg: DreamboothConfig, pictures: int = 1, sizes: Sequence[Size] = (), shards: int = 1
) -> MemoryPlan:
    """Predict the memory of a run from its config and the base's config alone.

    Args:
        cfg: the settings.
        pictures: how many pictures are encoded and kept.
        sizes: width and height in px of the photos, for the largest of the buckets they go to;
            none: the square, which no bucket exceeds.
        shards: processes that the denoiser's weights are split over.

    Raises:
        UserError: when the base's configs cannot be had, or a setting does not fit the base.
    """
    device = resolve_device(cfg.model.device)
    dtype = resolve_dtype(cfg.model.dtype, device)
    family = skeleton(cfg.model.base, dtype)
    parts = family.components
    width, height = _largest(cfg, family, sizes)
    save_vae_memory(parts.pipeline.vae, cfg.data.resolution_px or family.resolution_px)
    everything = _present(family)
    with torch.no_grad():
        pixels = torch.empty(1, 3, height, width, device=META)
        of_picture, latents = _held(everything, lambda: family.encode_images(pixels))
        of_prompt, conditioning = _held(everything, lambda: _conditioning(cfg, family, 1))
    held = part_bytes(cfg, family)
    encoding = sum(held.values()) + max(of_picture, of_prompt)
    if is_staged(device):
        encoders = sum(held[name] for name in parts.text_encoders)
        encoding = max(held["vae"] + of_picture, encoders + of_prompt)
        if cfg.train.prior == "class_images":  # drawn by the whole base
            encoding = max(encoding, sum(held.values()))

    parts.free_image_encoder()
    if not cfg.text_encoder.train:
        parts.free_text_encoders()
    remaining = part_bytes(cfg, family)
    remaining[parts.denoiser_name] //= shards
    weights = sum(remaining.values())
    passing = _passing_weight(cfg, parts.denoiser, shards)
    models = adapters.adapted_models(cfg, family)
    _add_adapters(cfg, family, models)
    inner = adapters.trained_parameters(models)
    copies = 2 + (cfg.train.ema_decay is not None)  # itself, its gradient, ...
    prompts = len(scene_prompts(cfg)) + 1 + 2 * len(cfg.data.each())  # negative, own and class's
    return MemoryPlan(
        weights=weights,
        outer_factors=bytes_of(t for model in models.values() for t in _outer(model)),
        trained=copies * bytes_of(inner.values()) + optimizer_bytes(cfg, inner),
        activations=_activations(cfg, family, models, latents, conditioning) + passing,
        cache=pictures * bytes_of([latents]) + prompts * bytes_of(tensors_of(conditioning)),
        encoding=encoding,
    )


def _largest(cfg: DreamboothConfig, family: Family, sizes: Sequence[Size]) -> Size:
    """Width and height of the largest training picture; class images are squares."""
    side = cfg.data.resolution_px or family.resolution_px
    buckets = buckets_of(cfg, side, family.size_multiple_px)
    if not buckets or not sizes or cfg.train.prior == "class_images":
        return side, side
    used = [closest_bucket(size, buckets) for size in sizes]
    return max(used, key=lambda size: size[0] * size[1])


def foresee(
    cfg: DreamboothConfig, pictures: int, sizes: Sequence[Size], shards: int
) -> tuple[tuple[int, int] | None, list[str]]:
    """What a dry run tells: ``picture_sizes``, and the plan in lines; arguments as for the plan.

    Configs that cannot be had now may be there at the run: then there are no sizes, and the reason.

    Raises:
        UserError: when a setting does not fit the base.
    """
    try:
        return picture_sizes(cfg), plan_memory(cfg, pictures, sizes, shards).lines()
    except NoConfigsError as error:
        return None, [f"predicted memory: unknown, because of {error}"]


def picture_sizes(cfg: DreamboothConfig) -> tuple[int, int]:
    """Training resolution and what sides must be multiples of, in px, by the base's config alone.

    Raises:
        UserError: when the base's configs cannot be had.
    """
    dtype = resolve_dtype(cfg.model.dtype, resolve_device(cfg.model.device))
    family = skeleton(cfg.model.base, dtype)
    return cfg.data.resolution_px or family.resolution_px, family.size_multiple_px


def part_bytes(cfg: DreamboothConfig, family: Family) -> dict[str, int]:
    """Bytes of each model of a skeleton on the device, quantised or offloaded as configured."""
    parts, mode = family.components, cfg.model.quantize
    names = ("vae", *parts.text_encoders, parts.denoiser_name)
    sizes = {name: bytes_of(_tensors(getattr(parts.pipeline, name))) for name in names}
    if mode != "none":
        saved = quantise.bytes_saved(parts.pipeline, mode)
        sizes = {name: size - saved.get(name, 0) for name, size in sizes.items()}
    if cfg.model.offload == "group":  # its layers are counted as they pass
        sizes[parts.denoiser_name] = 0
    return sizes


def _passing_weight(cfg: DreamboothConfig, denoiser: nn.Module, shards: int) -> int:
    """Bytes of weights that are there only while their layer, or their block, computes."""
    if shards > 1:
        blocks = repeated_blocks(denoiser)
        inside = [bytes_of(block.parameters()) for block in blocks]
        outside = bytes_of(denoiser.parameters()) - bytes_of(
            parameter for block in blocks for parameter in block.parameters()
        )
        return outside + 2 * max(inside, default=0)  # the next one is gathered meanwhile
    layers = [layer.weight.nbytes for _, layer in quantise.linears(denoiser, "none")]
    if cfg.model.offload == "group":
        return 2 * max(layers)  # the next one is fetched meanwhile
    return max(layers) if cfg.model.quantize != "none" else 0


def check_memory(
    cfg: DreamboothConfig,
    plan: MemoryPlan,
    available: int,
    pictures: int = 1,
    sizes: Sequence[Size] = (),
    shards: int = 1,
) -> None:
    """Refuse a run that cannot fit, and say what would make it fit.

    Args:
        cfg: the settings.
        plan: of these settings.
        available: bytes the device has free.
        pictures: as for the plan.
        sizes: as for the plan.
        shards: as for the plan.

    Raises:
        UserError: when the plan's peak is above ``available``; each change named was planned too.
    """
    if plan.peak <= available:
        return
    offers = [
        f"{change}: {_gb(other.peak - plan.peak)}"
        + (", which fits" if other.peak <= available else "")
        for change, changed in _savings(cfg, shards)
        if (other := plan_memory(changed, pictures, sizes, shards)).peak < plan.peak
    ]
    cures = "".join(f"\n  {offer}" for offer in offers) or "\n  no setting here saves any of it"
    raise UserError(
        f"this run needs {_gb(plan.peak)} and the device has {_gb(available)} free; what each "
        f"change would save:{cures}"
    )


def _savings(cfg: DreamboothConfig, shards: int) -> Iterator[tuple[str, DreamboothConfig]]:
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
    if cfg.model.quantize == "none" and cfg.model.offload == "none" and shards == 1:
        for mode in ("int8", "nf4"):
            yield f'model.quantize = "{mode}"', changed("model", quantize=mode)
        if not cfg.model.compile:
            yield 'model.offload = "group"', changed("model", offload="group")
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
        generator = torch.Generator().manual_seed(0)
        with adapters.cores_ahead(cfg, models):
            encoded = _conditioning(cfg, family, size) if cfg.text_encoder.train else given
            losses = family.loss(
                family.components.denoiser, batch, encoded, generator,
                options=loss_options(cfg.train),
            )  # fmt: skip
            losses.mean().backward()

    held, _ = _held([*_present(family), batch, *tensors_of(given)], step)
    return held - bytes_of(p for p in adapters.trained_parameters(models).values())


def _conditioning(cfg: DreamboothConfig, family: Family, rows: int) -> Conditioning:
    """Of ``rows`` prompts, with the framing of a whole square picture."""
    side = cfg.data.resolution_px or family.resolution_px
    framing = Framing(original_px=(side, side), crop_px=(0, 0), target_px=(side, side))
    encoded = family.encode_prompts([class_prompt(cfg.data.each()[0].class_name)] * rows)
    return family.frame(encoded, [framing] * rows)


def _held(present: Iterable[Tensor], call: Callable[[], Result]) -> tuple[int, Result]:
    """Most bytes a call held on top of what was present, and its result."""
    with LiveMemory() as memory:
        memory.ignore(present)
        result = call()
    return memory.peak, result


def _add_adapters(cfg: DreamboothConfig, family: Family, models: dict[str, nn.Module]) -> None:
    """Adapters as the run adds them, but with outer factors that have shapes only."""
    with deferred_factors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say it
        for component, model in models.items():
            denoiser = model is family.components.denoiser
            config = adapters.adapter_config(cfg, family, denoiser=denoiser)
            config.timestep_rank = None  # all inner dimensions, which some steps have
            adapters.add_adapter(component, model, config)
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
    return [tensor for module in modules for tensor in _tensors(module)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _outer(model: nn.Module) -> list[Tensor]:
    return [
        tensor
        for _, layer in iter_nora_layers(model)
        for tensor in layer.outer(adapters.NAME).buffers()
    ]
