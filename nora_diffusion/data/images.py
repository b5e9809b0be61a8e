"""Photos from a folder: any format and size Pillow reads, as upright RGB pictures."""

import contextlib
import hashlib
import importlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from nora_diffusion.config import UserError
from nora_diffusion.data.captions import read_captions
from nora_diffusion.data.masks import find_masks
from nora_diffusion.data.quality import sharpness
from nora_diffusion.disk import is_temporary

SUBJECT_LIMIT = 20
"""The most photos a subject folder may hold."""

_CURE = "bring it back and resume the run, or start a new one in another output.dir"


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
        caption: see ``captions``, or None.
        look: 64 bits that hardly change when the picture is scaled or compressed again.
        sharpness: see ``quality``, or None.
        mask: file that says what of it is to be learnt, or None.
        transparent: whether it has transparent places, which are a mask as well.
    """

    path: Path
    size: tuple[int, int]
    digest: str
    caption: str | None = None
    look: int | None = None
    sharpness: float | None = None
    mask: Path | None = None
    transparent: bool = False

    def open(self) -> Image.Image:
        """The picture in mode RGB.

        Raises:
            UserError: when the file is gone, or another than was found in the folder.
        """
        return _read(self._unchanged())[0]

    def open_mask(self) -> Image.Image | None:
        """What is to be learnt, white, in mode L and of the photo's size; None: all of it.

        Raises:
            UserError: when the mask cannot be read, has other proportions, or is all black; or as
                of ``open``.
        """
        if self.mask is None:
            mask = _read(self._unchanged())[1] if self.transparent else None
        else:
            mask = _read_mask(self.mask, self.size)
        if mask is not None and mask.getextrema() == (0, 0):
            raise UserError(
                f"{self.mask or self.path}: the mask is all black; white is what is learnt"
            )
        return mask

    def _unchanged(self) -> Path:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            told = f"{self.path}: this photo was there when the run began, and now cannot be read"
            raise UserError(f"{told} ({error.strerror}); {_CURE}") from None
        if hashlib.sha256(data).hexdigest() != self.digest:
            told = f"{self.path}: this photo has been changed since the run began"
            raise UserError(f"{told}; {_CURE}")
        return self.path


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
    paths = sorted(path for path in folder.iterdir() if not is_temporary(path))
    masks = find_masks(folder, (path for path in paths if path.is_file()))
    for path in paths:
        found = examine(path) if path not in masks else ""
        if isinstance(found, tuple):
            photos.append(found[0])
        elif found:
            skipped.append(Skipped(path, found))
    captions, used = read_captions([photo.path for photo in photos])
    used |= {path.parent for path in masks}
    skipped = [skip for skip in skipped if skip.path not in used]
    of_stem = {stem: path for path, stem in masks.items()}
    photos = [
        replace(photo, caption=captions.get(photo.path), mask=of_stem.get(photo.path.stem))
        for photo in photos
    ]
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
    return _read(path)[0]


def square(
    image: Image.Image,
    resolution_px: int,
    place: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Image.Image:
    """Scale the shorter side to the resolution and cut out a square; see ``fit``."""
    return fit(image, (resolution_px, resolution_px), place, flip)


def fit(
    image: Image.Image,
    size: tuple[int, int],
    place: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Image.Image:
    """Scale a picture to fill a size, and cut off what is over on one side pair.

    Args:
        image: any size, mode RGB or L.
        size: width and height of the result.
        place: where along x and y the cut-out lies, 0 to 1; (0.5, 0.5) is the centre.
        flip: mirror left and right.
    """
    width, height = image.size
    if width * size[1] > height * size[0]:
        cut_width, cut_height = height * size[0] / size[1], height
    else:
        cut_width, cut_height = width, width * size[1] / size[0]
    left, top = (width - cut_width) * place[0], (height - cut_height) * place[1]
    # One resampling of the cut-out, so a panorama is never blown up as a whole.
    result = image.resize(
        size,
        Image.Resampling.LANCZOS,
        box=(left, top, left + cut_width, top + cut_height),
        reducing_gap=3.0,
    )
    return ImageOps.mirror(result) if flip else result


def look_of(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than its right neighbour (dHash).

    Krawetz 2013, "Kind of like that". The packages for it bring SciPy along for two lines.
    """
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(levels[:, :-1] > levels[:, 1:]).tobytes(), "big")


def _read(path: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """The picture as ``read_image`` gives it, and its opacity in mode L where it is not whole."""
    register_heic()
    with warnings.catch_warnings():
        # Pillow warns from half its limit on and refuses above it; only the refusal counts here.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_formats()) as image:
            image.load()
            upright = _upright(image)
            opacity = None
            if upright.has_transparency_data:
                opacity = upright.convert("RGBA").getchannel("A")
                opacity = None if opacity.getextrema()[0] == 255 else opacity
            return _to_rgb(upright), opacity


def _read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        mask = read_image(path).convert("L")
    except Exception as error:  # as of photos
        raise UserError(f"{path}: a mask that cannot be read ({error})") from None
    (width, height), (own_width, own_height) = size, mask.size
    if abs(own_width * height - own_height * width) > max(own_width * height, 1) // 50:
        raise UserError(
            f"{path}: a mask of {own_width} x {own_height} px for a photo of {width} x {height}; "
            "give it the photo's proportions"
        )
    return mask.resize(size, Image.Resampling.BILINEAR) if mask.size != size else mask


def examine(path: Path) -> tuple[Photo, Image.Image] | str:
    """The photo in a file, without caption and mask, and its pixels; or why there is none."""
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a regular file"
    try:
        data = path.read_bytes()
        if not data:
            return "empty (0 bytes)"
        image, opacity = _read(path)
    except UnidentifiedImageError:
        if path.suffix.lower() in {".heic", ".heif"} and not register_heic():
            return "HEIC is read only with pillow-heif; run: pip install pillow-heif"
        photo = path.with_suffix("")  # a.jpg of a.jpg.txt, as some programs name captions
        if photo.is_file():
            return f"not an image; a caption is read from {photo.with_suffix(path.suffix).name}"
        return "not an image"
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"more than {most} million pixels; scale it down"
    except PermissionError:
        return "no permission to read it"
    except Exception as error:  # Pillow's readers raise all kinds of errors on broken files
        return f"broken ({error or type(error).__name__})"
    photo = Photo(
        path,
        image.size,
        hashlib.sha256(data).hexdigest(),
        look=look_of(image),
        sharpness=sharpness(image),
        transparent=opacity is not None,
    )
    return photo, image


def _found(skipped: Sequence[Skipped]) -> str:
    return f"it holds:\n{describe_skipped(skipped)}" if skipped else "it is empty"


@cache
def register_heic() -> bool:
    """Let Pillow read HEIC; False where pillow-heif is not installed."""
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
