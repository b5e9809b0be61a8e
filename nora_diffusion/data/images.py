"""Photos from a folder: any format and size Pillow reads, as upright RGB pictures."""

import contextlib
import hashlib
import importlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from nora_diffusion.config import UserError

SUBJECT_LIMIT = 20
"""The most photos a subject folder may hold."""


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Photo:
    """A readable picture in a folder; its pixels are read on demand, so many may be large.

    Attributes:
        path: the file.
        size: (width, height) in px, upright.
        digest: SHA-256 of the file's bytes, in hex.
        caption: text of the ``.txt`` file beside it, or None.
    """

    path: Path
    size: tuple[int, int]
    digest: str
    caption: str | None = None

    def open(self) -> Image.Image:
        """The picture in mode RGB."""
        return read_image(self.path)


def read_photos(
    folder: str | Path, key: str = "data.subject", limit: int | None = SUBJECT_LIMIT
) -> tuple[list[Photo], list[Skipped]]:
    """Find the photos in a folder, sorted by name; sub-folders are not entered.

    Args:
        folder: where the photos are.
        key: the user's name for the folder, for messages.
        limit: the most photos allowed; None: any number.

    Returns:
        The photos, and everything else in the folder with the reason it was skipped.

    Raises:
        UserError: when the folder does not exist, or holds no photo or too many.
    """
    folder = Path(folder).expanduser()
    shown = f'{key} = "{folder}"'
    if not folder.exists():
        raise UserError(f"{shown}: no such folder; give the folder that holds the photos")
    if not folder.is_dir():
        raise UserError(f"{shown}: is a file; give the folder that holds the photos")
    photos: list[Photo] = []
    skipped: list[Skipped] = []
    for path in sorted(folder.iterdir()):
        found = _examine(path)
        if isinstance(found, Photo):
            photos.append(found)
        else:
            skipped.append(Skipped(path, found))
    captions = {photo.path.with_suffix(".txt") for photo in photos}
    skipped = [skip for skip in skipped if skip.path not in captions]
    if not photos:
        raise UserError(f"{shown}: holds no usable photo; {_found(skipped)}")
    if limit is not None and len(photos) > limit:
        raise UserError(
            f"{shown}: holds {len(photos)} photos; keep the best 1 to {limit} and move the others"
        )
    return photos, skipped


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """The skipped files, one a line."""
    return "\n".join(f"  {skip.path.name}: {skip.reason}" for skip in skipped)


def read_image(path: str | Path) -> Image.Image:
    """Read one picture: first frame, upright, transparency over white, sRGB, 8 bits, mode RGB.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: what Pillow raises on a bad file.
    """
    _register_heic()
    with warnings.catch_warnings():
        # Pillow warns from half its limit on and refuses above it; only the refusal counts here.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_formats()) as image:
            image.load()
            return _to_rgb(_upright(image))


def square(
    image: Image.Image,
    resolution_px: int,
    place: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Image.Image:
    """Scale the shorter side to the resolution and cut out a square.

    Args:
        image: any size, mode RGB.
        resolution_px: side of the result.
        place: where along x and y the square lies, 0 to 1; (0.5, 0.5) is the centre.
        flip: mirror left and right.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * place[0], (height - side) * place[1]
    # One resampling of the cut-out, so a panorama is never blown up as a whole.
    result = image.resize(
        (resolution_px, resolution_px),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return ImageOps.mirror(result) if flip else result


def _examine(path: Path) -> Photo | str:
    """The photo in a file, or why there is none."""
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a regular file"
    try:
        data = path.read_bytes()
        if not data:
            return "empty (0 bytes)"
        size = read_image(path).size
    except UnidentifiedImageError:
        if path.suffix.lower() in {".heic", ".heif"} and not _register_heic():
            return "HEIC is read only with pillow-heif; run: pip install pillow-heif"
        return "not an image"
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"more than {most} million pixels; scale it down"
    except PermissionError:
        return "no permission to read it"
    except Exception as error:  # Pillow's readers raise all kinds of errors on broken files
        return f"broken ({error or type(error).__name__})"
    return Photo(path, size, hashlib.sha256(data).hexdigest(), _read_caption(path))


def _read_caption(photo: Path) -> str | None:
    path = photo.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) or None
    except UnicodeDecodeError:
        raise UserError(f"the caption {path} is not UTF-8 text; save it as UTF-8") from None


def _found(skipped: Sequence[Skipped]) -> str:
    return f"it holds:\n{describe_skipped(skipped)}" if skipped else "it is empty"


@cache
def _register_heic() -> bool:
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    heif.register_heif_opener()
    return True


@cache
def _formats() -> list[str]:
    Image.init()
    # EPS is a program that Pillow hands to Ghostscript: not a photo, and not to be run.
    return [name for name in Image.ID if name != "EPS"]


def _upright(image: Image.Image) -> Image.Image:
    # A damaged EXIF block says nothing of the pixels, which are used as they are.
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        flat = Image.alpha_composite(white, layer).convert("RGB")
        flat.info["icc_profile"] = image.info.get("icc_profile")
        return _to_srgb(flat) if image.mode in ("RGBA", "P") else flat
    return _to_srgb(image)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile (cameras write Display P3 and Adobe RGB, print CMYK)."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            result = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if result is not None:
                return result
    if image.mode == "LAB":
        lab, target = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, target, "LAB", "RGB")
        converted = ImageCms.applyTransform(image, transform)
        if converted is not None:
            return converted
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits or floats; the range is the narrowest usual one that holds it."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    values = np.maximum(values, 0.0)
    peak = float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif image.mode == "F":
        white = next((w for w in (1.0, 255.0, 65535.0) if peak <= w), peak)
    else:
        white = next((w for w in (255.0, 65535.0) if peak <= w), peak)
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))
