"""What stands beside every number: device, versions, command, commit, load."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nora_diffusion.disk import write_atomically

PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")


def write_record(path: Path, command: str, results: Mapping[str, Any], note: str = "") -> Path:
    """Write the numbers of a benchmark, with all that a reader must know to judge them.

    Args:
        path: of the JSON file; its stem is the benchmark's name.
        command: that measured them.
        results: the numbers, with units in the keys.
        note: what a reader must know about the run.
    """
    record = {
        "benchmark": path.stem,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "device": device(),
        "versions": {"python": platform.python_version(), **versions()},
        "note": note,
        "results": results,
    }
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


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
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "load_average_1m": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    """Return the CPU's name: times of two kinds of it do not compare."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
