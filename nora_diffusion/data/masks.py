"""Masks: what of a photo is to be learnt. White is learnt, black is background.

Found under the names that other trainers' users have: ``NAME-masklabel.png`` (OneTrainer),
``NAME-mask.*`` and ``NAME_mask.*``, ``masks/NAME.*`` (sd-scripts and ai-toolkit point at such a
folder), else the photo's own transparency.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "masks"
"""Folder beside the photos whose pictures are masks of those of the same name."""

ENDINGS = ("-masklabel", "-mask", "_mask")


def mask_owner(path: Path, stems: Collection[str]) -> str | None:
    """Stem of the photo that a file is a mask of, or None.

    Args:
        path: a file in a folder of photos.
        stems: of all files there: ``my-mask.png`` without a ``my.*`` is a photo.
    """
    for ending in ENDINGS:
        owner = path.stem.removesuffix(ending)
        if owner != path.stem and owner in stems:
            return owner
    return None


def find_masks(folder: Path, files: Iterable[Path]) -> Mapping[Path, str]:
    """Mask files of a folder and the stems of the photos they belong to, best name last.

    Args:
        folder: with the photos.
        files: directly in it.
    """
    files = list(files)
    stems = {path.stem for path in files}
    apart = sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else []
    found = {path: path.stem for path in apart if path.is_file() and path.stem in stems}
    best_last = sorted(files, key=lambda path: path.stem.endswith(ENDINGS[0]))
    beside = {path: owner for path in best_last if (owner := mask_owner(path, stems))}
    return {**found, **beside}


def latent_weights(mask: Tensor, size: tuple[int, int], background: float) -> Tensor:
    """Weights of the loss at latent resolution, (1, h, w) in [``background``, 1].

    Args:
        mask: (H, W) in [0, 1], 1 where the picture is to be learnt.
        size: h and w; each place gets the mean of the pixels it stands for.
        background: weight of what the mask leaves out, 0 to 1.
    """
    from torch.nn.functional import adaptive_avg_pool2d  # photos are found without torch

    share = adaptive_avg_pool2d(mask[None].float(), size)
    return background + (1 - background) * share
