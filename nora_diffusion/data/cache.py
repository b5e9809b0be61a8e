"""Encoded pictures, computed once and kept on disk."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nora_diffusion.config import UserError
from nora_diffusion.data.dataset import Item
from nora_diffusion.disk import write_atomically

_TOLD: set[Path] = set()  # folders that could not be written, and were warned of

Encode = Callable[[torch.Tensor], torch.Tensor]


def encode_items(
    items: Sequence[Item],
    encode: Encode,
    *,
    resolution_px: int,
    model: Mapping[str, str],
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Encode the pictures of all items, each once, taking what an earlier run left on disk.

    Pictures are encoded one at a time: in a batch the last bits of a latent depend on its
    neighbours, and a run would depend on what happened to be on disk.

    Args:
        items: the items; those with equal pixels are encoded once.
        encode: (1, 3, H, W) pixels in [-1, 1] to (1, ...) latents.
        resolution_px: side of the pictures.
        model: what else the latents depend on, such as the encoder's hash and dtype.
        folder: where encoded pictures are kept; None: nowhere.

    Returns:
        Latents without the batch axis, on the CPU, by ``Item.image_id``.

    Raises:
        UserError: naming the photo whose latents are not finite.
    """
    latents: dict[str, torch.Tensor] = {}
    for item in items:
        if item.image_id in latents:
            continue
        path = None if folder is None else _path(folder, item.image_id, resolution_px, model)
        latent = None if path is None else _load(path)
        if latent is None:
            latent = _encode(item, encode, resolution_px)
            if path is not None:
                _save(path, latent)
        latents[item.image_id] = latent
    return latents


def _encode(item: Item, encode: Encode, resolution_px: int) -> torch.Tensor:
    pixels = item.pixels(resolution_px)[None]
    try:
        latent = encode(pixels)[0].cpu().contiguous()
        if torch.isfinite(latent).all():
            return latent
        reason = "the result is not finite"
    except ValueError as error:  # what encoders raise on such a result themselves
        reason = str(error)
    raise UserError(
        f"{item.photo.path}: the base model cannot encode it ({reason}); "
        "try --model.dtype fp32, or remove the photo from its folder"
    )


def _path(folder: Path, image_id: str, resolution_px: int, model: Mapping[str, str]) -> Path:
    spec = json.dumps([image_id, resolution_px, sorted(model.items())])
    return folder / f"{hashlib.sha256(spec.encode()).hexdigest()}.safetensors"


def _load(path: Path) -> torch.Tensor | None:
    """A kept tensor, or None where there is none that is what was written."""
    try:
        kept = load(path.read_bytes())
        latent, digest = kept["latent"], kept["digest"]
    except (OSError, SafetensorError, KeyError):
        return None
    return latent if torch.equal(digest, _digest(path.name, latent)) else None


def _save(path: Path, latent: torch.Tensor) -> None:
    try:
        write_atomically(path, save({"latent": latent, "digest": _digest(path.name, latent)}))
    except OSError as error:  # a full or read-only disk: the run can go on
        folder = path.parent
        if folder not in _TOLD:  # once is enough for however many photos
            _TOLD.add(folder)
            warnings.warn(
                f"encoded pictures are not kept in {folder} ({error.strerror}); set "
                "NORA_CACHE_DIR to a folder that can be written",
                stacklevel=3,
            )


def _digest(name: str, latent: torch.Tensor) -> torch.Tensor:
    """(32,) bytes of SHA-256 over an entry's name, number format, shape and raw bytes."""
    digest = hashlib.sha256(f"{name} {latent.dtype} {tuple(latent.shape)}".encode())
    digest.update(latent.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
