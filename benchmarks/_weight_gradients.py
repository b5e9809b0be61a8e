"""The gradient of a subject's loss with respect to every adapted weight of mini, at the base."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.adapter.layer import NoraLayer
from nora_diffusion.train.adapters import subject_loss
from nora_diffusion.train.session import Session


def adapted_layers(session: Session) -> dict[str, NoraLayer]:
    """Every layer with an adapter, by component and module."""
    return {
        f"{component}.{name}": layer
        for component, model in session.models.items()
        for name, layer in iter_nora_layers(model)
    }


def summed_gradients(session: Session, batches: Iterable[int]) -> dict[str, Tensor]:
    """Sum over batches of the gradient ``(out, in)``, by component and module.

    The adapters must be in their initial state, where they change nothing.
    """
    layers = adapted_layers(session)
    weights: dict[str, nn.Parameter] = {
        name: layer.get_base_layer().weight for name, layer in layers.items()
    }
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for index in batches:
        loss = subject_loss(session.cfg, session.family, session.inputs, index, encode=True)
        found = torch.autograd.grad(loss, list(weights.values()))
        for total, gradient in zip(sums.values(), found, strict=True):
            total += gradient
    for weight in weights.values():
        weight.requires_grad_(False)
    return sums


def most_energy(energy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows and columns ``(count,)`` of a matrix that hold most: each of all of the other."""
    return energy.sum(1).topk(count).indices, energy.sum(0).topk(count).indices
