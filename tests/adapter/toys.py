"""Single base layers and what the tests of the layer do with them."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nora_diffusion.adapter import Conv2d, Linear, NoraConfig

LAYERS = ("linear", "conv1d", "conv2d")
INITS = ("orthogonal", "sigma")
BASES_OF_TYPE = ("weight", "weight_minor", "random")


def base_of(kind, seed=0):
    """A frozen base layer: 24 -> 16 features, or 4 -> 12 channels of a strided convolution."""
    torch.manual_seed(seed)
    layer = {
        "linear": lambda: nn.Linear(24, 16),
        "conv1d": lambda: Conv1D(16, 24),
        "conv2d": lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1),
    }[kind]()
    with torch.no_grad():
        layer.weight.normal_(std=0.3)
    return layer.requires_grad_(False)


def input_for(kind, samples=2):
    """A seeded batch for `base_of(kind)`."""
    shape = (samples, 4, 8, 8) if kind == "conv2d" else (samples, 5, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def adapted(base, adapter_name="default", **fields):
    """Wrap a base layer, as the model does, with r=8 and inner_r=4 where not given."""
    config = NoraConfig(**{"r": 8, "inner_r": 4, **fields})
    layer = (Conv2d if isinstance(base, nn.Conv2d) else Linear)(base)
    layer.update_layer(adapter_name, config, config.r, config.inner_r)
    layer.set_adapter([adapter_name])
    layer.derive_factors(adapter_name)
    return layer


def inner(layer, name="default"):
    """The trained pair ``P, Q``."""
    return [layer.nora_inner_B[name], layer.nora_inner_A[name]]


@torch.no_grad()
def perturb(layer, step=0.5):
    """Move every inner pair away from its start, as training would; returns the layer."""
    generator = torch.Generator().manual_seed(2)
    for name in layer.nora_inner_A:
        for parameter in inner(layer, name):
            parameter.add_(step * torch.randn(parameter.shape, generator=generator))
    return layer
