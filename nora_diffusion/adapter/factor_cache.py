"""The disk cache of outer factors, keyed by every byte of the weight.

A factorisation is a pure function of (weight bytes, r, basis, seed), so an entry never goes stale.
Entries carry a checksum: a file torn by a crash counts as missing, never as factors.
"""

import hashlib
import os
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

#: Part of the folder's name; raised whenever `factorise` may return other numbers than before.
ALGORITHM_VERSION = 1
_LOCK = threading.Lock()
_TOLD: set[Path] = set()  # folders that could not be written, and were warned of
_TENSORS = ("outer_B", "outer_A", "singular_values")


@dataclass(frozen=True)
class Factors:
    """The frozen outer pair of one module.

    Attributes:
        outer_B: ``U (out, r)`` float32, orthonormal columns.
        outer_A: ``V (r, in)`` float32, orthonormal rows; ``in`` counts the kernel of a convolution.
        singular_values: ``(r,)`` float32, descending, not negative.
        fingerprint: Digest of the weight they come from.
    """

    outer_B: Tensor
    outer_A: Tensor
    singular_values: Tensor
    fingerprint: str

    @property
    def r(self) -> int:
        """The outer rank."""
        return self.outer_A.shape[0]

    def to(self, device: torch.device) -> "Factors":
        """Return the factors on another device."""
        moved = (getattr(self, name).to(device) for name in _TENSORS)
        return Factors(*moved, fingerprint=self.fingerprint)


def fingerprint(weight: Tensor) -> str:
    """Return a SHA-256 hex digest over a weight's dtype, shape and every raw byte."""
    data = weight.detach().to("cpu").contiguous()
    name = str(data.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{name}{tuple(data.shape)}".encode())
    raw: Any = data.flatten().view(torch.uint8).numpy()
    digest.update(memoryview(raw))
    return digest.hexdigest()


def cache_dir() -> Path | None:
    """Return the folder of the cache, or None where ``NORA_CACHE_DIR`` is set to nothing."""
    chosen = os.environ.get("NORA_CACHE_DIR")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nora"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "nora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nora"


def cached_factors(fingerprint: str, r: int, basis: str, seed: int) -> Factors | None:
    """Return the factors stored for a weight, on the CPU, or None if there are none.

    Args:
        fingerprint: Digest of the weight, from `fingerprint`.
        r: Outer rank after clamping to the weight's shape.
        basis: ``"weight"`` or ``"weight_minor"``; other bases are never cached.
        seed: Seed of the factorisation.
    """
    path = _entry(fingerprint, r, basis, seed)
    if path is None or not os.path.isfile(path):  # also where the folder cannot be looked into
        return None
    try:
        opened: Any = safetensors.safe_open(path, framework="pt")
        with opened as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in _TENSORS}
            metadata: dict[str, str] = file.metadata() or {}
            recorded = metadata.get("checksum")
    except (OSError, safetensors.SafetensorError):
        recorded, tensors = None, {}
    if recorded is None or recorded != _checksum(path.name, tensors):
        warnings.warn(
            f"the cached factors in {path} are damaged; they are computed again", stacklevel=2
        )
        return None
    return Factors(**tensors, fingerprint=fingerprint)


def store(factors: Factors, r: int, basis: str, seed: int) -> None:
    """Write factors to the cache; one that cannot be written is warned about once a process."""
    path, folder = _entry(factors.fingerprint, r, basis, seed), cache_dir()
    if path is None or folder is None:
        return
    tensors = {name: getattr(factors, name).cpu() for name in _TENSORS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own per writer, so that two processes never write into one file.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save(tensors, {"checksum": _checksum(path.name, tensors)}))
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        with _LOCK:  # factors are stored from several threads
            told = folder in _TOLD
            _TOLD.add(folder)
        if not told:
            warnings.warn(
                f"cannot cache factors in {folder} ({error.strerror}); set NORA_CACHE_DIR to a "
                "writable folder, or to nothing to do without the cache",
                stacklevel=2,
            )


def _entry(fingerprint: str, r: int, basis: str, seed: int) -> Path | None:
    folder = cache_dir()
    if folder is None:
        return None
    name = f"{fingerprint}-{basis}-r{r}-s{seed}.safetensors"
    return folder / f"factors-v{ALGORITHM_VERSION}" / fingerprint[:2] / name


def _checksum(name: str, tensors: dict[str, Tensor]) -> str:
    """Digest of an entry, over its name as well: a renamed file is no entry."""
    digests = name + "".join(fingerprint(tensors[name]) for name in _TENSORS)
    return hashlib.sha256(digests.encode()).hexdigest()
