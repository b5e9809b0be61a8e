"""What every benchmark writes beside its numbers: device, versions, command, commit, load."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nora_diffusion.disk import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_KERNEL = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")
PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")


def write_result(name: str, results: dict[str, Any], note: str = "") -> Path:
    """Write `benchmarks/results/NAME.json` and return its path.

    Args:
        name: Name of the benchmark.
        results: Its numbers, with units in the keys.
        note: What a reader must know about the run.
    """
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit(),
        "device": device(),
        "versions": {"python": platform.python_version(), **versions()},
        "note": note,
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


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
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: on a GPU each launches a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in NO_KERNEL)
        return func(*args, **(kwargs or {}))


def commit() -> str:
    """Return the commit, with "+changes" where the checkout differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def device() -> dict[str, Any]:
    """Describe the machine, and how busy it was."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "load_average_1m": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
