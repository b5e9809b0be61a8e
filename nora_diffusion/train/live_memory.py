"""How much memory a computation holds at its peak, counted from the shapes of its tensors.

Works on the meta device, where tensors have shapes and no contents: a step of a model too large
for this machine is run through autograd in seconds, and its live storages are added up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory:
    """Counts the bytes of storages that operations make while it is entered.

    Storages made before do not count; nor do the tensors' Python objects. Attention is counted as
    the fused kernels of CUDA and CPU do it, without the matrix of scores, whatever the device.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_fused_attention())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._modes.close()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these tensors out: they were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size


class _Operations(TorchDispatchMode):
    """Shows every result of every operation, in forward and backward, to a `LiveMemory`."""

    def __init__(self, memory: LiveMemory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A value is asked for where there is none. What code asks is whether all is well
            # (finite, unmasked), and it is.
            return args[0].dtype == torch.bool
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self.memory.count(leaf)
        return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace attention on the meta device, where torch would make the matrix of scores."""
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.is_meta:
            mask = args[0] if args else kwargs.get("attn_mask")
            return _Attention.apply(query, key, value, mask)  # pyright: ignore[reportReturnType]
        return original(query, key, value, *args, **kwargs)

    # Not a TorchFunctionMode: that is off inside backward, where checkpointed layers run again.
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and one float32 a row (Dao et al. 2022, arXiv 2205.14135).

    And a mask of numbers, such as T5's bias of positions, of which every layer makes its own.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (B, H, L, V), empty."""
        # (B, L, H, V) in memory, as the fused kernels write it: reshaping it makes no copy.
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = mask if mask is not None and mask.is_floating_point() else None
        ctx.save_for_backward(query, key, value, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Returns empty gradients of the three inputs."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
