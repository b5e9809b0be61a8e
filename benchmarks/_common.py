"""What the benchmarks share: where results go, and what a forward pass keeps and computes."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nora_diffusion.bench.record import write_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_KERNEL = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


def write_result(name: str, results: dict[str, Any], note: str = "") -> Path:
    """Write `benchmarks/results/NAME.json` and return its path.

    Args:
        name: Name of the benchmark.
        results: Its numbers, with units in the keys.
        note: What a reader must know about the run.
    """
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return write_record(RESULTS / f"{name}.json", command, results, note)


def bytes_saved(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that autograd keeps in a forward pass, the model's own aside."""
    # Not by address: on the meta device all are 0.
    resident = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # no storage may be freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            sizes[storage._cdata] = storage.nbytes()
        # Detached: what a node saves of its own output would lead back to the node, in a cycle that
        # no collector sees, and the whole graph would stay.
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


class Stopwatch:
    """Seconds of a call: by the clock on CUDA, else of the process, without other work."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        self.now = time.perf_counter if on_gpu else time.process_time

    def __call__(self, call: Callable[[], Any]) -> float:
        """Time one call."""
        self.synchronize()
        start = self.now()
        call()
        self.synchronize()
        return self.now() - start


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: on a GPU each launches a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in NO_KERNEL)
        return func(*args, **(kwargs or {}))
