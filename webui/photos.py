"""One uploaded photo: what it is, what is wrong with it, and the pictures we make of it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from nora_diffusion.data.buckets import MAX_ASPECT, cut_share, enlargement
from nora_diffusion.data.images import (
    SUBJECT_LIMIT,
    Photo,
    examine,
    read_image,
    register_heic,
    square,
)
from nora_diffusion.data.survey import WORTH_SAYING, is_blurred, near_duplicates

FORMATS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "HEIF": ".heic"}
"""Pillow's name of a format to the ending that we give such a file; MPO is a JPEG of phones."""

FILE_LIMIT_BYTES = 64 * 2**20
RESOLUTIONS_PX = (64, 512, 1024)
THUMBNAIL_PX = 256
FEW = 3
"""Below this number of photos a subject is learnt badly."""

_one_at_a_time = threading.Lock()  # a photo of Pillow's limit takes half a gigabyte while decoded


@dataclass(frozen=True)
class Check:
    """What is wrong with one photo.

    Attributes:
        photo: the name it was uploaded under; "" where it is about all of them.
        level: "warning": it is used as it is; "unusable": it is left out.
        reason: a sentence with what to do.
    """

    photo: str
    level: Literal["warning", "unusable"]
    reason: str


@dataclass(frozen=True)
class Examined:
    """A photo that can be used: what was found, the ending for its format, and its thumbnail."""

    photo: Photo
    suffix: str
    thumbnail: Image.Image


def look_at(path: Path) -> Examined | str:
    """Read an uploaded file, or say why it cannot be used."""
    size = path.stat().st_size
    if size > FILE_LIMIT_BYTES:
        return f"{size / 2**20:.0f} MB; at most {FILE_LIMIT_BYTES // 2**20} MB are taken"
    with _one_at_a_time:
        format = _format_of(path)
        found = examine(path) if format in FORMATS or not format else f"it is a {format} file"
        if isinstance(found, str):
            return f"cannot be used: {found}; give a whole JPEG, PNG, WebP or HEIC file"
        photo, image = found
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return Examined(photo, FORMATS[format], image)


def write_picture(image: Image.Image, path: Path) -> None:
    """Write a picture of ours, as WebP: pixels alone, nothing of what the camera wrote."""
    bare = Image.new("RGB", image.size)
    bare.paste(image)
    path.parent.mkdir(exist_ok=True)
    bare.save(path, "WEBP", quality=85)


def write_cropped(photo: Path, resolution_px: int, path: Path) -> None:
    """Write the square that a photo becomes for a base of that resolution."""
    with _one_at_a_time:
        write_picture(square(read_image(photo), resolution_px), path)


def check_photos(photos: Mapping[str, Photo], resolution_px: int) -> list[Check]:
    """What is wrong with photos that can be read.

    Args:
        photos: by the names they were uploaded under.
        resolution_px: of the pictures that are trained on.
    """
    names = {photo.path.name: name for name, photo in photos.items()}
    alike: dict[str, list[str]] = {}
    for first, second in near_duplicates(list(photos.values())):
        alike.setdefault(names[second], []).append(names[first])
    checks = []
    for name, photo in photos.items():
        reasons = _reasons(photo, resolution_px)
        if name in alike:
            others = " and ".join(alike[name])
            reasons.append(f"nearly the same picture as {others}; keep one of them")
        checks += [Check(name, "warning", reason) for reason in reasons]
    if photos and len(photos) < FEW:
        told = "1 photo" if len(photos) == 1 else f"{len(photos)} photos"
        checks.append(
            Check("", "warning", f"only {told}: {FEW} to {SUBJECT_LIMIT} teach it better")
        )
    return checks


def _reasons(photo: Photo, resolution_px: int) -> list[str]:
    (width, height), target = photo.size, (resolution_px, resolution_px)
    reasons = []
    factor, cut = enlargement(photo.size, target), cut_share(photo.size, target)
    if factor > 1 + WORTH_SAYING:
        reasons.append(
            f"too small: {width} x {height} px, enlarged {factor:.1f} times for "
            f"{resolution_px} px; use a larger one if you can"
        )
    if is_blurred(photo):
        reasons.append("blurred, or without detail; use a sharper one")
    if cut > 1 - 1 / MAX_ASPECT + WORTH_SAYING:
        shape = "wide" if width > height else "tall"
        reasons.append(
            f"very {shape}: {cut:.0%} of it is cut off; crop it around the subject yourself"
        )
    return reasons


def _format_of(path: Path) -> str:
    """Pillow's name of a file's format, from its first bytes; "" where it knows none."""
    register_heic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture of many pixels is measured when it is read
        try:
            with Image.open(path) as image:
                return image.format or ""
        except Exception:  # Pillow's readers raise all kinds of errors on broken files
            return ""
