"""What an adapter file says of itself, read without torch and before any tensor is touched.

A file from anywhere is taken only if it is safetensors to the last byte and holds pairs of a NoRA
or LoRA. Sources: safetensors' format description, and docs/formats.md for our own header.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nora_diffusion.config import UserError

FILE_LIMIT_BYTES = 2**30
HEADER_LIMIT_BYTES = 8 * 2**20
TENSOR_LIMIT = 20_000
RANK_LIMIT = 4096
FORMAT_VERSION = 1

_BYTES_OF = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
_DENOISERS = ("unet.", "transformer.")
_INNER = re.compile(r"(.+)\.nora_inner_([AB])")
_NATIVE = re.compile(r".+\.(?:nora_(?:inner|outer)_[AB]|nora_singular_values|nora_saved\..+)")
# The first and second matrix of a LoRA in the layouts of PEFT, diffusers, kohya, and old diffusers.
_DOWN = re.compile(r"(.+[._])(?:lora_A|lora_down|lora\.down)((?:\.\w+)?\.weight)")
_UP = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
_LORA = re.compile(
    r".+(?:lora_[AB]|lora_(?:down|up)|lora\.(?:down|up))(?:\.\w+)?\.weight|.+\.alpha|.+\.dora_scale"
)


@dataclass(frozen=True)
class Tensor:
    """Entry of a tensor in the header; begin and end count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class AdapterFile:
    """What a file is.

    Attributes:
        kind: "nora" for a native file, "lora" for any other.
        about: fields of our own header; empty in another program's file.
        r: outer rank of a native file, rank of a LoRA: the largest, if native of the denoiser.
        inner_r: inner rank of a native file, likewise.
        checksum: of the content, as recorded in our own header.
    """

    kind: str
    about: dict[str, Any]
    r: int
    inner_r: int | None
    checksum: str | None

    def word(self, name: str) -> str | None:
        """A text of the header, or None."""
        value = self.about.get(name)
        return value if isinstance(value, str) and value else None


def read_adapter(path: Path) -> AdapterFile:
    """Check a file from its first to its last byte, and read what it says of itself.

    Raises:
        UserError: on anything that is not an adapter in a whole safetensors file.
    """
    size = path.stat().st_size
    if size > FILE_LIMIT_BYTES:
        raise UserError(f"the file has {size / 2**30:.1f} GB; at most 1 GB is taken")
    with path.open("rb") as file:
        metadata, tensors, start = _read_header(file, size)
        kind, about, checksum = _own_header(metadata)
        if kind == "nora":
            r, inner_r = _native_ranks(tensors, about)
        else:
            r, inner_r = _lora_rank(tensors), None
        if checksum is not None and checksum != _checksum(file, metadata, tensors, start):
            raise UserError(
                "the file is damaged: its content does not match its checksum; copy or download "
                "it again"
            )
    return AdapterFile(kind, about, r, inner_r, checksum)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Tensor], int]:
    first = file.read(8)
    if first[:2] == b"PK" or first[:1] == b"\x80":
        raise UserError(
            "this is a pickle or ZIP file, which can run code when opened, so it is not read; use "
            "the .safetensors version of this adapter"
        )
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= size - 8:
        raise UserError("this is no safetensors file, or it is cut off; copy or download it again")
    if length > HEADER_LIMIT_BYTES:
        raise UserError(f"its header has {length / 2**20:.0f} MB, far more than any adapter's")
    try:
        table = json.loads(file.read(length), object_pairs_hook=_no_doubles)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise UserError("this is no safetensors file: its header is not JSON") from None
    if not isinstance(table, dict):
        raise UserError("this is no safetensors file: its header is no table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError("this is no safetensors file: its metadata are not text")
    if len(table) > TENSOR_LIMIT:
        raise UserError(f"it holds {len(table):,} tensors; an adapter has at most {TENSOR_LIMIT:,}")
    tensors = {name: _tensor(name, entry) for name, entry in table.items()}
    _check_layout(tensors, size - 8 - length)
    return metadata, tensors, 8 + length


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or not isinstance(shape, list) or len(shape) > 8:
            raise ValueError
        if any(type(n) is not int or not 0 <= n < 2**40 for n in (*shape, begin, end)):
            raise ValueError
        size = _BYTES_OF[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"the entry of its tensor {_short(name)} cannot be used; the file is damaged, or in a "
            f"number format other than {', '.join(_BYTES_OF)}"
        ) from None
    if end - begin != size:
        raise UserError(f"its tensor {_short(name)} has another size than its shape; it is damaged")
    return Tensor(dtype, tuple(shape), begin, end)


def _check_layout(tensors: dict[str, Tensor], size: int) -> None:
    """The tensors must fill the file: no gap, no overlap, nothing behind (as the format says)."""
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise UserError(f"its tensor {_short(name)} is not where it must be; it is damaged")
        at = tensor.end
    if at != size:
        raise UserError("its tensors do not fill the file; it is cut off or damaged")


def _own_header(metadata: dict[str, str]) -> tuple[str, dict[str, Any], str | None]:
    """Kind, fields and checksum, from our own header or for want of one."""
    if not any(key.startswith("nora.") for key in metadata):
        return "lora", {}, None
    version = metadata.get("nora.format_version", "")
    if version.isascii() and version.isdigit() and int(version[:9]) > FORMAT_VERSION:
        raise UserError("it was written by a newer version of nora-diffusion; update this one")
    checksum = metadata.get("nora.checksum")
    try:
        about = json.loads(metadata["nora.header"])
        kind = {"native": "nora", "lora": "lora"}[about["kind"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        about, kind = None, ""
    if version != str(FORMAT_VERSION) or checksum is None or not isinstance(about, dict):
        raise UserError("its NoRA header is not complete; copy or download it again")
    return kind, about, checksum


def _native_ranks(tensors: dict[str, Tensor], about: dict[str, Any]) -> tuple[int, int]:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if not _NATIVE.fullmatch(name):
            raise UserError(f"its tensor {_short(name)} belongs to no NoRA adapter")
        if match := _INNER.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor.shape
    if not pairs:
        raise UserError("it holds no NoRA pairs")
    ranks: dict[str, tuple[int, ...]] = {}
    for module, pair in pairs.items():
        inner_A, inner_B = pair.get("A", ()), pair.get("B", ())
        if len(inner_A) != 2 or inner_A[::-1] != inner_B or not 0 < max(inner_A) <= RANK_LIMIT:
            raise UserError(f"the pair of {_short(module)} has shapes that do not fit together")
        ranks[module] = inner_A
    drawing = [ranks[module] for module in ranks if module.startswith(_DENOISERS)]
    shown = drawing or list(ranks.values())
    return max(r for _, r in shown), max(k for k, _ in shown)


def _lora_rank(tensors: dict[str, Tensor]) -> int:
    ranks = []
    for name, tensor in tensors.items():
        if not _LORA.fullmatch(name):
            raise UserError(
                f"its tensor {_short(name)} belongs to no LoRA or NoRA adapter; only these two are "
                "taken (not LoHa, LoKr, embeddings or whole models)"
            )
        match = _DOWN.fullmatch(name)
        if match is None:
            continue
        word = name[match.end(1) : match.start(2)]
        up = tensors.get(match[1] + _UP[word] + match[2])
        down = tensor.shape
        if up is None or len(down) not in (2, 4) or len(up.shape) not in (2, 4):
            raise UserError(f"{_short(name)} has no partner of a fitting shape; it is no LoRA pair")
        if not 0 < down[0] == up.shape[1] <= RANK_LIMIT:
            raise UserError(f"{_short(name)} and its partner have different ranks")
        ranks.append(down[0])
    if not ranks:
        raise UserError("it holds no LoRA and no NoRA pairs")
    return max(ranks)


def _checksum(
    file: BinaryIO, metadata: dict[str, str], tensors: dict[str, Tensor], start: int
) -> str:
    """As ``adapter.header.checksum``: of our metadata, dtypes, shapes, then all bytes by name."""
    entries = {k: v for k, v in metadata.items() if k.startswith("nora.") and k != "nora.checksum"}
    shapes = {name: [tensor.dtype, *tensor.shape] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([entries, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        file.seek(start + tensors[name].begin)
        digest.update(file.read(tensors[name].end - tensors[name].begin))
    return digest.hexdigest()


def _short(name: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return f"“{shown[:60]}…”" if len(shown) > 60 else f"“{shown}”"
