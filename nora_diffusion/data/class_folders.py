"""Pictures in a folder with a subfolder a class, and k of each class chosen from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from nora_diffusion.data.image_instructions import PictureError, open_image
from nora_diffusion.settings import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Pool:
    """Pictures of known classes: `pixels` (N, 3, S, S) and `labels` (N,), indices of `classes`."""

    classes: tuple[str, ...]
    pixels: Tensor
    labels: Tensor

    def take(self, index: Sequence[int]) -> "Pool":
        """The pictures at `index`."""
        chosen = torch.tensor(index, device=self.labels.device)
        return Pool(self.classes, self.pixels[chosen], self.labels[chosen])


def find_classes(folder: Path, key: str) -> dict[str, list[Path]]:
    """The pictures in a folder with a subfolder a class, by class; none is opened.

    Raises:
        UserError: it has fewer than two subfolders with pictures.
    """
    if not folder.is_dir():
        raise UserError(f"{key} = {str(folder)!r}: no such folder")
    files = {
        sub.name: sorted(p for p in sub.iterdir() if p.suffix.lower() in ENDINGS)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    }
    files = {name: paths for name, paths in files.items() if paths}
    if len(files) < 2:
        raise UserError(
            f"{key} = {str(folder)!r}: must hold a subfolder with pictures for each of two or more "
            f"classes; found {len(files)} (pictures end with {', '.join(ENDINGS)})"
        )
    return files


def read_classes(
    folder: Path, key: str, prepare: Callable[[Sequence[Image.Image]], Tensor]
) -> Pool:
    """Reads a folder with a subfolder a class; what is no picture is left out.

    Raises:
        UserError: it has fewer than two subfolders with pictures, or a picture is broken.
    """
    files = find_classes(folder, key)
    try:
        pixels = [prepare([open_image(path) for path in paths]) for paths in files.values()]
    except PictureError as error:
        raise UserError(f"{key}: {error}") from None
    labels = [i for i, paths in enumerate(files.values()) for _ in paths]
    together = torch.cat(pixels)
    return Pool(tuple(files), together, torch.tensor(labels, device=together.device))


def choose_shots(pool: Pool, shots: int, seed: int) -> Pool:
    """`shots` random pictures of each class; fewer shots are a part of more."""
    random, index = Random(seed), []
    for label in range(len(pool.classes)):
        members = (pool.labels == label).nonzero().flatten().tolist()
        random.shuffle(members)
        index += members[:shots]
    return pool.take(index)
