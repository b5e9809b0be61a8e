"""Fitting the start of the inner pairs: which inner directions the loss wants to move first."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .layer import NoraLayer
from .model import iter_nora_layers

Batch = TypeVar("Batch")

# torch ships no annotations for its linear algebra.
_linalg: Any = torch.linalg


def fit_start(
    model: nn.Module,
    batches: Iterable[Batch],
    step: Callable[[Batch], Tensor],
    adapter_name: str = "default",
) -> None:
    """Fit the inner pairs of an adapter with ``init="gradient"`` (docs/method.md).

    The gradient of the loss with respect to the core between ``U`` and ``V``, at the base and
    averaged over the batches, is ``A diag(s) B^T`` with ``s`` descending. ``Q`` becomes the first
    `inner_r` rows of ``B^T``, the input directions along which the loss falls fastest; ``P`` stays
    zero, so the model does, and as ``P0 Q0 = 0`` nothing more has to be stored. Needs the memory of
    one training step; works on quantised weights. A module without a finite gradient that is not
    zero keeps its seeded start.

    Args:
        model: A model that already has the adapter, in its initial state.
        batches: What to run; a dozen batches are enough.
        step: Runs the model on one batch and returns the scalar loss.
        adapter_name: The adapter.

    Raises:
        ValueError: The adapter is missing, merged, of another `init`, has a basis that was not
            fitted, or there are no batches.
    """
    layers = [layer for _, layer in iter_nora_layers(model) if adapter_name in layer.nora_outer]
    if not layers:
        raise ValueError(f"the model has no NoRA adapter called {adapter_name!r}")
    init = layers[0].nora_config[adapter_name].init
    if init != "gradient":
        raise ValueError(f'adapter {adapter_name!r} has init={init!r}; only "gradient" is fitted')
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged into the base; unmerge them before fit_start")
    for layer in layers:
        layer.derive_factors(adapter_name)
    gradients = _mean_core_gradients(layers, adapter_name, batches, step)
    for layer, gradient in zip(layers, gradients, strict=True):
        if bool(torch.isfinite(gradient).all()) and bool(gradient.any()):
            Q = layer.nora_inner_A[adapter_name]
            with torch.no_grad():
                Q.copy_(_largest_inputs(gradient, Q.shape[0]))


def _largest_inputs(gradient: Tensor, count: int) -> Tensor:
    """The first right singular vectors ``(count, r)`` of a core's gradient ``(r, r)``."""
    # On the CPU in float64: tiny matrices, and not every device has the dtype.
    return _linalg.svd(gradient.double().cpu()).Vh[:count]


def _mean_core_gradients(
    layers: list[NoraLayer],
    name: str,
    batches: Iterable[Any],
    step: Callable[[Any], Tensor],
) -> list[Tensor]:
    """Gradient ``(r, r)`` of the loss with respect to every core, at zero, over the batches."""
    with _free_cores(layers, name) as cores:
        sums = [torch.zeros_like(core) for core in cores]
        ran = False
        for batch in batches:
            ran = True
            with torch.enable_grad():
                loss = step(batch)
            # Not backward(): nothing else that is trainable may be left with a gradient.
            found = cast(
                "tuple[Tensor | None, ...]",
                torch.autograd.grad(loss, cores, allow_unused=True),
            )
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
    if not ran:
        raise ValueError("fit_start was given no batches")
    return sums


@contextmanager
def _free_cores(layers: list[NoraLayer], name: str) -> Generator[list[nn.Parameter], None, None]:
    """Let ``P (r, r)``, at zero, be the whole core (``Q`` the identity) of every layer.

    Dropout and a timestep law are off meanwhile: what they leave out is to be seen too.
    """
    before = [
        (layer.nora_inner_B[name], layer.nora_inner_A[name], layer.nora_config[name])
        for layer in layers
    ]
    cores: list[nn.Parameter] = []
    try:
        for layer in layers:
            device, r = layer.nora_inner_B[name].device, layer.r[name]
            cores.append(nn.Parameter(torch.zeros(r, r, device=device)))
            layer.nora_inner_B[name] = cores[-1]
            layer.nora_inner_A[name] = nn.Parameter(torch.eye(r, device=device), False)
            layer.nora_config[name] = copy(layer.nora_config[name])
            layer.nora_config[name].timestep_rank = None
            layer.nora_config[name].dropout = 0.0
        yield cores
    finally:
        for layer, (P, Q, config) in zip(layers, before, strict=True):
            layer.nora_inner_B[name], layer.nora_inner_A[name] = P, Q
            layer.nora_config[name] = config
