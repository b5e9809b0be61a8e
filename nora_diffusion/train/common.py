"""What every recipe shares: seeds, optimiser, schedule, moving average, interrupts, divergence."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nora_diffusion import language_config, vision_language_config
from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.config import Adapter, Train, UserError
from nora_diffusion.families.objective import LossOptions

Schedule = Literal["constant", "cosine", "linear"]


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite, or the loss has exploded."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: a checkpoint was saved, and the message says how to go on."""


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, number formats and raw bytes of a module's parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_plain_parameters(module)):
        data = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters; of quantised ones the codes, and the scales that hang on the tensor."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):  # of torchao
            parts: Any = parameter
            yield from ((f"{name}.{p}", getattr(parts, p)) for p in parts.__tensor_flatten__()[0])
            continue
        yield name, parameter
        absmax = getattr(getattr(parameter, "quant_state", None), "absmax", None)
        if absmax is not None:  # of bitsandbytes
            yield f"{name}.absmax", absmax


@contextlib.contextmanager
def as_recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a fit recompute activations as the run's steps do, so that it needs no more memory.

    Transformers recomputes only what is in training mode; dropout stays off all the same.

    Args:
        model: with gradient checkpointing enabled; it is in evaluation mode afterwards.
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.eval()


FIT_BATCHES, START_BATCHES = 32, 16
"""Batches from which a data-driven basis, and the start of the inner pairs, are fitted."""


def adapter_tensors(models: Iterable[nn.Module]) -> list[Tensor]:
    """All tensors that make up NoRA adapters: inner pairs, their start, outer factors."""
    return [
        tensor
        for model in models
        for _, layer in iter_nora_layers(model)
        for part in (
            layer.nora_inner_A, layer.nora_inner_B, layer.nora_initial_A, layer.nora_initial_B,
            layer.nora_outer,
        )
        for tensor in (*part.parameters(), *part.buffers())
    ]  # fmt: skip


def nora_config(
    cfg: Adapter | language_config.Adapter | vision_language_config.Adapter,
    target_modules: str | list[str],
    **others: Any,
) -> NoraConfig:
    """What a config's section [adapter] says of NoRA, as PEFT reads it.

    Args:
        cfg: the section.
        target_modules: the modules it means in the model at hand.
        others: further fields, and those that differ from the section.
    """
    names = ("r", "inner_r", "scaling", "dropout", "init", "basis", "seed")
    fields = {name: getattr(cfg, name) for name in names} | others
    return NoraConfig(target_modules=target_modules, **fields)


def loss_options(cfg: Train, part: tuple[int, int] = (0, 1)) -> LossOptions:
    """What the config says of timesteps, noise and weights; for ``part`` see ``LossOptions``."""
    return LossOptions(
        min_snr_gamma=cfg.min_snr_gamma,
        soft_min_snr=cfg.soft_min_snr,
        timestep_law=cfg.timestep_law,
        offset_noise=cfg.offset_noise,
        part=part,
    )


def derive_seed(seed: int, *stream: int | str) -> int:
    """Seed of one random stream, such as ``(seed, "noise", step)``: the same on every platform.

    A step's randomness depends on its number alone, so a resumed run draws what an uninterrupted
    one does without any generator state being saved.
    """
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits everywhere


def step_generator(
    seed: int, step: int, micro_step: int, device: torch.device | None = None, rank: int = 0
) -> torch.Generator:
    """CPU generator for timesteps and noise of one forward pass, the same in every process.

    The global generators of the CPU and of ``device``, which dropout draws from, are seeded along
    with it (one by one: ``torch.manual_seed`` takes milliseconds over all kinds of device), for
    each process ``rank`` differently.
    """
    of_rank = (rank,) if rank else ()
    dropout_seed = derive_seed(seed, "dropout", step, micro_step, *of_rank)
    torch.default_generator.manual_seed(dropout_seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(dropout_seed)
    return torch.Generator().manual_seed(derive_seed(seed, "noise", step, micro_step))


def lr_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak learning rate for the update number ``step`` (from 0).

    Rises linearly to 1 over the warm-up, then stays, or falls to 0 after the last step along a
    half cosine or a line.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "linear":
        return max(0.0, 1 - progress)
    return 1.0


def make_adamw(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over ``(parameters, peak learning rate)`` groups.

    The fused kernel updates hundreds of small inner factors in one call, on CPU and CUDA.
    """
    return torch.optim.AdamW(
        [
            {"params": list(parameters), "lr": learning_rate, "peak_lr": learning_rate}
            for parameters, learning_rate in groups
            if parameters
        ],
        weight_decay=weight_decay,
        fused=groups[0][0][0].device.type in ("cpu", "cuda"),
    )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to ``factor`` times its peak; returns the first group's rate.

    With Prodigy the rate is a factor on the one it has found so far, ``d``; their product is
    returned.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    first = optimizer.param_groups[0]
    return first["lr"] * first.get("d", 1.0)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The tensors of an optimiser's state as ``<parameter>/<state>``; none shares memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in names.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                shared = value.data_ptr() in seen  # bitsandbytes' code books are
                seen.add(value.data_ptr())
                found[f"{name}/{key}"] = value.clone() if shared else value
    return found


def optimizer_numbers(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """The rest of an optimiser's state, as JSON values: counters, and what its groups found."""

    def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}

    return {
        "groups": [numbers(group) for group in optimizer.param_groups],
        "parameters": {
            name: kept
            for name, parameter in names.items()
            if (kept := numbers(optimizer.state[parameter]))
        },
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Inverse of ``optimizer_tensors`` and ``optimizer_numbers``.

    Raises:
        KeyError: when a tensor belongs to no parameter.
    """
    numbers = numbers or {"groups": [], "parameters": {}}  # of AdamW there is nothing to know
    for group, kept in zip(optimizer.param_groups, numbers["groups"], strict=False):
        group.update(kept)
    for name, kept in numbers["parameters"].items():
        optimizer.state[names[name]].update(kept)
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        optimizer.state[names[name]][state] = value.to(names[name].device).clone()


class MovingAverage:
    """Exponential moving average of named parameters (float32).

    The decay is ramped up, min(decay, (1 + n)/(10 + n)) after n updates, so that the start of
    training is forgotten early.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start the average at the parameters as they are."""
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after the update number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the parameters for the time of a ``with`` block."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        copy_into(self.parameters, self.average)
        try:
            yield
        finally:
            copy_into(self.parameters, trained)


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: when names or shapes differ.
    """
    if parameters.keys() != values.keys():
        odd = sorted(parameters.keys() ^ values.keys())
        raise ValueError(f"parameters and values differ in {len(odd)} names, first {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise ValueError(f"{name}: {tuple(values[name].shape)} for {tuple(parameter.shape)}")
        parameter.copy_(values[name])


class DivergenceGuard:
    """Stops a run whose loss or gradient is not finite, or whose loss has exploded.

    Exploded means: the mean of the last ten losses is more than ten times that of the first ten
    and more than 10. Targets have unit variance, so a denoiser that knows nothing has a loss of 1.
    """

    WINDOW = 10
    FACTOR = 10.0

    def __init__(self, first: Sequence[float] = ()) -> None:
        """Start, or go on with the ``first`` losses of the run that is resumed."""
        self.first = list(first)
        self.last: deque[float] = deque(maxlen=self.WINDOW)

    def check(self, loss: float, grad_norm: float | None) -> str | None:
        """Take in one step; returns what is wrong, or None.

        Args:
            loss: of the step.
            grad_norm: before clipping; None where a gradient scaler deals with overflow.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if len(self.first) < self.WINDOW:
            self.first.append(loss)
        self.last.append(loss)
        mean = sum(self.last) / len(self.last)
        limit = self.FACTOR * max(1.0, sum(self.first) / len(self.first))
        if len(self.last) == self.WINDOW and mean > limit:
            return f"the loss has exploded (mean of the last {self.WINDOW} steps: {mean:.3g})"
        return None


class StopSignal:
    """Remembers Ctrl-C or SIGTERM until the step at hand is finished; a second one is obeyed.

    Use as a context manager around the loop; outside the main thread it never fires.
    """

    def __init__(self, *, patient: bool = False) -> None:
        """With ``patient`` a second one is not obeyed: a launcher repeats what it was sent."""
        self.name: str | None = None
        self._patient = patient
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
