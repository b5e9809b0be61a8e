"""Fitting the data-driven bases: what a layer sees, or wants to change, over some batches.

Modality-free: the caller brings the batches and the step that runs the model on one of them. A
diffusion recipe draws timesteps inside its step, so that the statistics cover all of them.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .factors import DATA_BASES, factorise_many
from .layer import NoraLayer
from .model import iter_nora_layers

Batch = TypeVar("Batch")


def fit_basis(
    model: nn.Module,
    batches: Iterable[Batch],
    step: Callable[[Batch], Tensor | None],
    adapter_name: str = "default",
) -> None:
    """Derive the outer factors of an adapter whose `basis` is "activation" or "gradient".

    The adapter is bypassed meanwhile; afterwards its inner pairs are in their initial state. Such
    factors cannot be derived again from the weights, so the adapter's files must carry them.

    Args:
        model: A model that already has the adapter.
        batches: What to run, a few dozen batches at most.
        step: Runs the model on one batch. For "gradient" it returns the scalar loss; for
            "activation" it runs without gradients and its result is ignored.
        adapter_name: The adapter.

    Raises:
        ValueError: The adapter is missing or merged, its basis needs no data, there are no batches,
            a module took no part in them, or a base weight is quantised ("gradient" only).
    """
    layers = {n: layer for n, layer in iter_nora_layers(model) if adapter_name in layer.nora_outer}
    if not layers:
        raise ValueError(f"the model has no NoRA adapter called {adapter_name!r}")
    basis = next(iter(layers.values())).outer(adapter_name).spec.basis
    if basis not in DATA_BASES:
        raise ValueError(
            f"adapter {adapter_name!r} has basis={basis!r}, derived from the weights; only "
            f"{' and '.join(DATA_BASES)} are fitted to data"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError("adapters are merged into the base; unmerge them before fit_basis")
    collect = _mean_magnitudes if basis == "activation" else _mean_gradients
    with _bypassed(layers.values()):
        statistics = collect(layers, batches, step)
    jobs = [
        layer.factor_job(adapter_name, statistics[name], name) for name, layer in layers.items()
    ]
    for layer, factors in zip(layers.values(), factorise_many(jobs), strict=True):
        layer.adopt_factors(adapter_name, factors)


@contextmanager
def _bypassed(layers: Iterable[NoraLayer]) -> Generator[None, None, None]:
    """Let the layers run their base alone, without touching what requires gradients."""
    before = [(layer, layer.disable_adapters) for layer in layers]
    try:
        for layer, _ in before:
            layer.bypass(True)
        yield
    finally:
        for layer, disabled in before:
            layer.bypass(disabled)


def _mean_magnitudes(
    layers: dict[str, NoraLayer], batches: Iterable[Any], step: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """Mean of ``|x|`` over samples and positions, of every input feature of every layer."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def observe(name: str, layer: NoraLayer) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = layer.input_rows(inputs[0].detach()).abs().float()
            sums[name] = sums.get(name, 0) + rows.sum(dim=0)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return hook

    handles = [
        layer.get_base_layer().register_forward_pre_hook(observe(name, layer))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                step(batch)
    finally:
        for handle in handles:
            handle.remove()
    _check_seen(layers, sums)
    return {name: layer.per_column(sums[name] / counts[name]) for name, layer in layers.items()}


def _mean_gradients(
    layers: dict[str, NoraLayer], batches: Iterable[Any], step: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every base weight, averaged over the batches."""
    weights: dict[str, nn.Parameter] = {
        name: cast(Any, layer.get_base_layer()).weight for name, layer in layers.items()
    }
    for name, layer in layers.items():
        if layer.quantization_backend is not None:
            raise ValueError(
                f"{name} is quantised, and basis='gradient' needs the gradient of its weight; use "
                "basis='activation' or 'weight', or fit on a float base and load a portable file"
            )
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                loss = step(batch)
            # Not backward(): nothing else that is trainable may be left with a gradient.
            gradients = cast(
                "tuple[Tensor | None, ...]",
                torch.autograd.grad(loss, list(weights.values()), allow_unused=True),
            )
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    sums[name] = sums.get(name, 0) + gradient.float()
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
    _check_seen(layers, sums)
    # The mean's length does not matter: only its singular directions are used.
    return {name: layer.as_matrix(sums[name]) for name, layer in layers.items()}


def _check_seen(layers: dict[str, NoraLayer], sums: dict[str, Tensor]) -> None:
    unseen = [name for name in layers if name not in sums]
    if unseen:
        raise ValueError(
            f"fit_basis saw no data for {len(unseen)} of {len(layers)} modules, e.g. {unseen[0]}; "
            "give at least one batch, and a step that runs the whole model"
        )
