"""What is computed ahead of forward passes: whole updates where nothing is trained, else cores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


class LowRankPair(NamedTuple):
    """An update ``up @ down`` of a weight as a matrix.

    Attributes:
        down: ``(rank, in)``.
        up: ``(out, rank)``.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def sum(cls, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> LowRankPair:
        """The sum of several updates ``(down, up)`` as one pair of that dtype."""
        downs, ups = zip(*pairs, strict=True)
        return cls(torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype))


KeptPairs: TypeAlias = dict[tuple[Any, ...], LowRankPair | None]
"""By dtype of the input, and name and scale of each active adapter."""

JointCores: TypeAlias = dict[str, tuple[float, Tensor]]
"""By adapter: the scale that is in its core ``(r, r)``, and the core."""


@contextmanager
def kept_updates(*models: nn.Module) -> Iterator[None]:
    """Compute the update of every NoRA layer once, for all forward passes of a ``with`` block.

    For sampling and evaluation: without it a layer multiplies ``P Q`` anew in each pass, since it
    cannot know that they have not changed, and sends its input through the outer rank. Here it adds
    a pair of the inner rank instead, in fewer and smaller products. Adapters and scales may be
    switched inside the block; the *values* of ``P`` and ``Q`` must stay as they are. Passes that
    need gradients, are traced by ``torch.compile``, or follow a timestep law or dropout run as
    ever.

    Args:
        models: with adapted layers; blocks may be nested.
    """
    layers = _layers(models, "_kept_pairs")
    for layer in layers:
        layer._kept_pairs = {}
    try:
        yield
    finally:
        for layer in layers:
            layer._kept_pairs = None


@contextmanager
def joint_cores(*models: nn.Module) -> Iterator[None]:
    """Compute the cores of all NoRA layers together, for one forward and backward pass.

    For training: by itself every layer multiplies its ``P`` and ``Q``, casts the core, and undoes
    both in the backward pass, in six small kernels. A GPU spends more time on launching these than
    on running them; here all layers of one shape share them. Scales, adapters and the values of
    ``P`` and ``Q`` must stay as they are inside the block. Recomputed blocks (gradient
    checkpointing) take the same cores; layers that are traced by ``torch.compile`` or follow a
    timestep law compute their own.

    Args:
        models: with adapted layers. One *backward* pass a block: the cores belong to its graph.
    """
    layers = _layers(models, "_joint_cores")
    for layer in layers:
        layer._joint_cores = {}
    try:
        _compute_cores(layers)
        yield
    finally:
        for layer in layers:
            layer._joint_cores = None


def _layers(models: Sequence[nn.Module], attribute: str) -> list[Any]:
    """NoRA layers whose attribute is not set yet."""
    modules = (module for model in models for module in model.modules())
    return [module for module in modules if getattr(module, attribute, ...) is None]


def _compute_cores(layers: Sequence[Any]) -> None:
    """Give every layer the cores of its active adapters: groups of one shape at a time."""
    groups: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for layer in layers:
        for name in layer._present(layer.active_adapters):
            config, scaling = layer.nora_config[name], layer.scaling[name]
            if scaling == 0 or config.timestep_rank is not None or not layer.outer(name).derived:
                continue
            P = layer.nora_inner_B[name]
            dtype = layer.outer(name).outer_A.dtype  # that of the base, in which the layer computes
            shifted = name in layer.nora_initial_A
            groups[P.shape, P.dtype, P.device, dtype, scaling, shifted].append((layer, name))
    for (*_, dtype, scaling, shifted), members in groups.items():
        P = torch.stack([layer.nora_inner_B[name] for layer, name in members])
        Q = torch.stack([layer.nora_inner_A[name] for layer, name in members])
        if shifted:
            initial = [layer.initial_pair(name) for layer, name in members]
            P0, Q0 = (torch.stack(side) for side in zip(*initial, strict=True))
            cores = torch.baddbmm(torch.bmm(P0, Q - Q0), P - P0, Q)
        else:
            cores = torch.bmm(P, Q)
        cores = (cores if scaling == 1 else cores * scaling).to(dtype)
        for (layer, name), core in zip(members, cores.unbind(), strict=True):
            layer._joint_cores[name] = (scaling, core)
