"""Checkpoints a killed run can be continued from: whole or absent, and checked when read.

    checkpoints/step-200/   trainable.safetensors  optimizer.safetensors  ema.safetensors
                            state.json (step, settings, SHA-256 of itself and each other file)

A checkpoint is written under another name in the same folder, synced and renamed, so no crash
leaves half of one under its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from nora_diffusion.disk import naming, write_atomically

FOLDER = "checkpoints"
STATE = "state.json"
VERSION = 2
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        path: its folder.
        step: optimiser steps completed.
        state: what was saved as JSON.
        tensors: file stem ("trainable", "optimizer", "ema") to named tensors, on the CPU.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    run: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
) -> Path:
    """Write ``checkpoints/step-N`` and remove all but the newest ``keep``.

    Args:
        run: the run folder.
        step: N, optimiser steps completed.
        state: JSON values.
        tensors: file stem to named tensors.
        keep: checkpoints to leave, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: naming that folder, when it cannot be written; older ones are as they were.
    """
    parent = run / FOLDER
    final = parent / f"step-{step}"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".partial-*"):  # of a run that was killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    partial = parent / f".partial-{step}-{os.getpid()}"
    try:
        with naming(final):
            _fill(partial, step, state, tensors)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    if final.exists():  # the same step once more: bit-identical anyway
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(parent)
    _prune(parent, step, keep)
    return final


def _fill(
    folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    folder.mkdir()
    digests: dict[str, str] = {}
    for stem, named in tensors.items():
        data = save({name: t.detach().cpu().contiguous() for name, t in named.items()})
        digests[f"{stem}.safetensors"] = hashlib.sha256(data).hexdigest()
        write_atomically(folder / f"{stem}.safetensors", data)
    described = {"version": VERSION, "step": step, "files": digests, **state}
    described = json.loads(json.dumps(described))  # as it will be read back
    described["digest"] = _digest(described)
    write_atomically(folder / STATE, json.dumps(described, indent=1).encode())
    _sync_folder(folder)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; damaged ones are named in a warning."""
    for _, path in sorted(_steps(run / FOLDER), reverse=True):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}) and passed over", stacklevel=2)
    return None


def newest_path(run: Path, before: int | None = None) -> Path | None:
    """Folder of the newest checkpoint (of those of at most ``before`` steps), unread, or None."""
    steps = [found for found in _steps(run / FOLDER) if before is None or found[0] <= before]
    return max(steps, default=(0, None))[1]


def _read(path: Path) -> Checkpoint:
    state: dict[str, Any] = json.loads((path / STATE).read_bytes())
    if state["version"] != VERSION:
        raise ValueError(f"its version is {state['version']}, this program writes {VERSION}")
    if state["digest"] != _digest(state):
        raise ValueError(f"{STATE} is not what was written")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, digest in state["files"].items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} is not what was written")
        tensors[Path(name).stem] = load(data)
    return Checkpoint(path, int(state["step"]), state, tensors)


def _steps(parent: Path) -> list[tuple[int, Path]]:
    if not parent.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in parent.iterdir()]
    return [(int(match[1]), path) for match, path in matches if match]


def _prune(parent: Path, step: int, keep: int) -> None:
    older = sorted((n, path) for n, path in _steps(parent) if n < step)
    for _, path in older[: max(0, len(older) - keep + 1)]:
        # Renamed first: a crash while deleting must not leave half a checkpoint under its name.
        doomed = path.with_name(f".partial-{path.name}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of what ``state.json`` holds besides this digest."""
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened, and renames are durable
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
