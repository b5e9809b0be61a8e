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
        mark: What `mark` returned after the merge, to notice when someone else changed the weight.
    """

    weight: Tensor
    quantised_layer: nn.Module | None = None
    mark: object = None


def read(layer: BaseTunerLayer) -> Tensor:
    """Return the weight of the base layer as floats, dequantised where it is quantised."""
    base: Any = layer.get_base_layer()
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes repacks 4-bit weights for inference on a CPU, in a layout that its
        # dequantisation misreads; saving the layer brings the plain layout back.
        base.state_dict()
    return layer.get_base_weight()


def take_backup(layer: BaseTunerLayer) -> Backup:
    """Copy the base weight of a layer to the CPU."""
    quantised = layer.quantization_backend is not None
    return Backup(
        weight=read(layer).detach().to("cpu", copy=True),
        quantised_layer=copy.deepcopy(layer.get_base_layer()) if quantised else None,
    )


def mark(layer: BaseTunerLayer) -> object:
    """Return something that changes when the weight of the base layer is replaced."""
    base: Any = layer.get_base_layer()
    if layer.quantization_backend is not None:
        # Backends make a new parameter or layer when they quantise, but may repack one in place.
        return getattr(base, "weight", base)
    # The sum of the raw bits as integers: exact, on the device, and one pass over memory.
    weight = base.weight.detach().contiguous().flatten()
    size, together = weight.element_size(), 8 // weight.element_size()
    if weight.numel() % together == 0 and weight.storage_offset() % together == 0:
        size = 8  # modulo 2 ** 64, and ten times as fast on a CPU as to widen smaller ones
    return str(weight.dtype), int(weight.view(_INTEGER_OF_SIZE[size]).sum(dtype=torch.int64))


def is_intact(layer: BaseTunerLayer, backup: Backup) -> bool:
    """Tell whether the weight is still the one whose mark the backup has.

    Another adapter may sit on the same base layer and be merged or unmerged in between.
    """
    now = mark(layer)
    return now is backup.mark if backup.quantised_layer is not None else now == backup.mark


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
    base: Any = layer.get_base_layer()
    base.weight.data.copy_(weight)
