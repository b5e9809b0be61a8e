"""Reading, replacing and exactly restoring the weight of a base layer, quantised or not."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Backup:
    """The weight of a base layer as it was before a merge.

    Attributes:
        weight: Float values of the original weight, on the CPU.
        quantised_layer: A copy of the quantised base layer: requantising would not restore it.
        checksum: Checksum of the merged weight, to notice when someone else changed it.
    """

    weight: Tensor
    quantised_layer: nn.Module | None = None
    checksum: int = 0


def take_backup(layer: BaseTunerLayer) -> Backup:
    """Copy the base weight of a layer to the CPU."""
    quantised = layer.quantization_backend is not None
    return Backup(
        weight=layer.get_base_weight().detach().to("cpu", copy=True),
        quantised_layer=copy.deepcopy(layer.get_base_layer()) if quantised else None,
    )


def is_intact(layer: BaseTunerLayer, backup: Backup) -> bool:
    """Tell whether the weight is still the one whose checksum the backup has.

    Another adapter may sit on the same base layer and be merged or unmerged in between.
    """
    return backup.checksum == checksum(layer)


def restore(layer: BaseTunerLayer, backup: Backup) -> None:
    """Bring the original weight back, to the last bit."""
    if backup.quantised_layer is None:
        write(layer, backup.weight)
        return
    owner: Any = layer
    while hasattr(owner.base_layer, "base_layer"):
        owner = owner.base_layer
    owner.base_layer = backup.quantised_layer


def write(layer: BaseTunerLayer, weight: Tensor) -> None:
    """Set the base weight, quantising it where the layer is quantised."""
    if layer.quantization_backend is not None:
        layer.set_base_weight(weight)
        return
    # In place, so that tied weights and views of flattened parameters follow.
    layer.get_base_layer().weight.data.copy_(weight)


def checksum(layer: BaseTunerLayer) -> int:
    """Sum the raw bits of the base weight as integers: exact, and one pass over memory."""
    weight = layer.get_base_weight().detach().contiguous()
    integers = weight.flatten().view(_INTEGER_OF_SIZE[weight.element_size()])
    return int(integers.sum(dtype=torch.int64)) ^ hash(str(weight.dtype))
