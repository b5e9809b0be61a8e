"""Safetensors files with a verified content: atomic write, checksum, and a strict parse.

The checksum covers every tensor (name, dtype, shape, bytes) and every metadata entry of the
project, so a file that parses is the file that was written. Layout: `docs/formats.md`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import save as serialise

from nora_diffusion.disk import write_atomically

CHECKSUM_KEY = "nora.checksum"
_PREFIX = "nora."
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class AdapterFileError(ValueError):
    """An adapter file that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a safetensors file holds: its text metadata and its tensors on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]


def read(path: Path) -> Contents:
    """Read and verify a safetensors file.

    A file without checksum (another program's LoRA) is read as it is; one with a checksum must
    match it.

    Raises:
        AdapterFileError: not a file, not safetensors, truncated, damaged.
    """
    data = _read_bytes(path)
    metadata = _parse_metadata(path, data)
    tensors: dict[str, torch.Tensor] = {}
    try:
        deserialise = cast(Any, safetensors).deserialize
        for name, entry in cast("list[tuple[str, dict[str, Any]]]", deserialise(data)):
            if entry["dtype"] not in DTYPES:
                raise AdapterFileError(
                    f"{path}: tensor {name!r} is in {entry['dtype']}, which is not read (only "
                    f"{', '.join(DTYPES)}); convert the file to float16 first"
                )
            tensors[name] = _as_tensor(entry)
    except AdapterFileError:
        raise
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error
    recorded = metadata.get(CHECKSUM_KEY)
    if recorded is not None and recorded != checksum(metadata, tensors):
        raise damaged(path, "its content does not match its checksum")
    return Contents(metadata, tensors)


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and metadata atomically, with the checksum added to the metadata.

    The bytes go to a temporary name in the same folder, are synced to disk and renamed, so that
    `path` is at all times either the old file or the complete new one.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, CHECKSUM_KEY: checksum(metadata, tensors)}
    write_atomically(path, _reproducible(serialise(tensors, metadata=metadata)))
    return path


def size_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of a file of these tensors, which may be on the meta device.

    Args:
        tensors: by name.
        metadata: all of it; `write` adds `CHECKSUM_KEY` with 64 letters.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    # The library's order: it decides where a tensor lies, so how many digits its place has.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        table[name] = {**entry, "data_offsets": [begin, end]}
        begin = end
    return len(_as_prefix(table)) + begin


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the project's metadata entries and all tensors, independent of their order."""
    digest = hashlib.sha256()
    entries = {
        key: value
        for key, value in metadata.items()
        if key.startswith(_PREFIX) and key != CHECKSUM_KEY
    }
    shapes = {name: [_DTYPE_NAMES[t.dtype], *t.shape] for name, t in tensors.items()}
    digest.update(json.dumps([entries, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        # reshape(-1) first: a scalar (a kohya alpha) cannot be viewed as bytes.
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that adapter files are not written in.

    Raises:
        ValueError: neither a float dtype of 16 or 32 bits nor None.
    """
    allowed = (torch.float32, torch.float16, torch.bfloat16)
    if dtype is not None and dtype not in allowed:
        raise ValueError(
            f"dtype={dtype}: use one of {', '.join(map(str, allowed))}, or None for the trained one"
        )


def damaged(path: Path, reason: str) -> AdapterFileError:
    """Error for a file whose bytes are not what was written."""
    return AdapterFileError(
        f"{path}: damaged or incomplete file ({reason}). Copy or download it again, or export it "
        "again from the training run."
    )


def _reproducible(data: bytes) -> bytes:
    """Sort the metadata, which the library writes in random order: same content, same bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    return _as_prefix(table) + data[8 + length :]


def _as_prefix(table: Mapping[str, Any]) -> bytes:
    """What a file has before its tensors."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _read_bytes(path: Path) -> bytes:
    # Read at once rather than memory-mapped: a file that shrinks under a mapping ends the process.
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise AdapterFileError(f"{path}: a folder. Give the .safetensors file inside it.") from None
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error}).") from error


def _parse_metadata(path: Path, data: bytes) -> dict[str, str]:
    if len(data) < 8:
        raise damaged(path, f"{len(data)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MAX_HEADER_BYTES, len(data) - 8):
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise AdapterFileError(
                f"{path}: a pickle file, which can run code when opened, so it is not read. "
                "Use the .safetensors version of this adapter."
            )
        raise damaged(path, "not safetensors, or cut off inside its header")
    try:
        header = json.loads(data[8 : 8 + length])
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON: {error}") from error
    metadata = (
        cast("dict[str, Any]", header).get("__metadata__", {}) if isinstance(header, dict) else None
    )
    if not isinstance(metadata, dict):
        raise damaged(path, "its header is not a table")
    entries = cast("dict[str, Any]", metadata)
    if not all(isinstance(value, str) for value in entries.values()):
        raise damaged(path, "its metadata are not text")
    return entries


def _as_tensor(entry: dict[str, Any]) -> torch.Tensor:
    dtype = DTYPES[entry["dtype"]]
    shape = cast("list[int]", entry["shape"])
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(entry["data"], dtype=dtype).reshape(shape)
