"""A denoiser that is larger than the GPU: weights in main memory, layers brought over in turn.

diffusers' group offloading does so for the forward pass. Made for inference, it leaves the backward
pass with weights that are gone again, which is mended here by what autograd offers for that:
frozen weights are not kept for the backward pass but looked up, and brought over once more.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def offload_layers(model: nn.Module, device: torch.device, *, prefetch: bool) -> None:
    """Run a model on ``device`` while its weights stay on the CPU; before adapters are added.

    What is added to the model afterwards is left where it is put: trained parameters stay on the
    device.

    Args:
        model: frozen, on the CPU.
        device: where its layers compute.
        prefetch: bring the next layer while one computes (CUDA only, and not with gradient
            checkpointing, whose recomputed layers follow another order).
    """
    weights = {id(parameter): parameter for parameter in model.parameters()}
    apply_group_offloading(
        model, onload_device=device, offload_device=torch.device("cpu"),
        offload_type="leaf_level", use_stream=prefetch,
    )  # fmt: skip

    def keep(tensor: Tensor) -> Any:
        """A frozen weight, or a view of one, is kept as the parameter and where to look in it."""
        parameter = weights.get(id(tensor if tensor._base is None else tensor._base))
        if parameter is None:
            return tensor
        return parameter, tensor.size(), tensor.stride(), tensor.storage_offset()

    def bring(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        parameter, *place = kept
        return parameter.data.to(device, non_blocking=True).as_strided(*place)

    entered: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        entered.append(saved_tensors_hooks(keep, bring))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        if entered:  # an earlier hook may have failed before this one's turn
            entered.pop().__exit__(None, None, None)

    def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not any(tensor.requires_grad for tensor in (*tensors, *block.parameters())):
            return block(*args, **kwargs)  # before the first adapter: nothing is kept anyway

        # Of torch's two kinds of checkpoint the one that runs a block again as it ran at first: the
        # other hands out weights as they are after the block, gone. It needs an input with a
        # gradient, which a block that trains need not have.
        def run(_: Tensor, *inputs: Any) -> Any:
            with saved_tensors_hooks(keep, bring):
                return block(*inputs, **kwargs)

        return checkpoint(run, torch.empty(0, requires_grad=True), *args, use_reentrant=True)

    # Not around model.forward, which diffusers sets back when it removes a hook of its own: with
    # prefetching after the first pass.
    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    if hasattr(model, "enable_gradient_checkpointing"):
        enable: Any = model.enable_gradient_checkpointing
        replaced: Any = functools.partial(enable, checkpointed)
        model.enable_gradient_checkpointing = replaced
