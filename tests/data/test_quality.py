"""Sharpness: what the threshold separates, and what it does not depend on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from nora_diffusion.data.images import read_image, read_photos
from nora_diffusion.data.quality import BLURRED, sharpness
from nora_diffusion.data.survey import survey

SUBJECT = Path(__file__).parent.parent.parent / "sample_data" / "subject"


def blurred(image: Image.Image, share: float) -> Image.Image:
    """Blurred with a Gaussian of a share of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def test_the_sample_photos_are_sharp_until_they_are_blurred():
    """The numbers in the docstring of ``BLURRED``."""
    photos = [read_image(path) for path in sorted(SUBJECT.glob("*.jpg"))]
    assert min(map(sharpness, photos)) > 54
    below = [
        sum(sharpness(blurred(photo, share)) < BLURRED for photo in photos)
        for share in (0.004, 0.006, 0.008)
    ]
    assert below == [3, 5, 5]


def test_more_blur_is_less_sharp():
    photo = read_image(SUBJECT / "05.jpg")
    found = [sharpness(blurred(photo, share)) for share in (0, 0.002, 0.004, 0.008)]
    assert found == sorted(found, reverse=True) and found[0] > 4 * found[-1]


def test_more_pixels_do_not_make_a_photo_blurred():
    """The same scene from a camera of ten times the pixels is judged alike."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    scene = Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)
    large = scene.resize((2560, 2560), Image.Resampling.BICUBIC)
    assert sharpness(large) == pytest.approx(sharpness(scene), rel=0.2)


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (5000, 3)])
def test_too_thin_a_picture_is_not_judged(size):
    assert sharpness(Image.new("RGB", size)) == float("inf")


def test_the_formula():
    """One white pixel on black: the Laplacian is -4 there, 1 beside it and 0 elsewhere."""
    pixels = np.zeros((7, 7), np.uint8)
    pixels[3, 3] = 1
    laplacian = np.zeros(25)
    laplacian[0], laplacian[1:5] = -4, 1
    assert sharpness(Image.fromarray(pixels)) == pytest.approx(laplacian.var())


def test_the_command_line_tells_which_photo_is_blurred(tmp_path):
    photo = read_image(SUBJECT / "01.jpg")
    photo.save(tmp_path / "sharp.png")
    blurred(photo, 0.02).resize((128, 128)).save(tmp_path / "shaky.png")
    photos, skipped = read_photos(tmp_path)
    said = survey(photos, skipped, "x", targets=[(256, 256)] * 2)
    assert "  shaky.png: enlarged 2.0 times (it has 128 x 128 px) for 256 x 256, blurred" in said
    assert "  shaky.png: blurred" in survey(photos, skipped, "x")
    assert not any(line.startswith("  sharp.png:") for line in said)
