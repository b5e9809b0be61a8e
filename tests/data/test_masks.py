"""Masks: where they are found, how they are cut, and the weights they give."""

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion.config import UserError
from nora_diffusion.data import images
from nora_diffusion.data.dataset import subject_views
from nora_diffusion.data.images import read_photos
from nora_diffusion.data.masks import latent_weights


def right_half(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.jpg")
    return tmp_path


def items(folder, **options):
    photos, _ = read_photos(folder)
    return subject_views(photos, trigger="sks", class_name="dog", **options)


@pytest.mark.parametrize(
    "name", ["a-masklabel.png", "a-mask.png", "a_mask.webp", "masks/a.png", "masks/a.jpg"]
)
def test_masks_are_found_under_every_usual_name_and_are_no_photos(folder, name):
    (folder / "masks").mkdir()
    right_half(32, 16).save(folder / name, lossless=True)  # of another size: scaled
    (photo,), skipped = read_photos(folder)
    assert photo.path.name == "a.jpg" and photo.mask == folder / name
    assert [skip.path.name for skip in skipped] == ([] if "/" in name else ["masks"])
    mask = photo.open_mask()
    assert mask is not None and mask.size == (64, 32)
    assert mask.getpixel((5, 5)) < 10 and mask.getpixel((60, 5)) > 245


def test_of_several_masks_the_first_of_the_list_counts(folder):
    (folder / "masks").mkdir()
    for name in ("masks/a.png", "a_mask.png", "a-masklabel.png"):
        right_half(64, 32).save(folder / name)
        (photo,), skipped = read_photos(folder)
        assert photo.mask == folder / name and skipped == []


def test_a_photo_that_is_only_called_so_is_a_photo(folder):
    Image.new("RGB", (8, 8)).save(folder / "wolf-mask.png")
    names = [photo.path.name for photo in read_photos(folder)[0]]
    assert names == ["a.jpg", "wolf-mask.png"]


def test_transparency_is_a_mask_and_a_file_goes_before_it(tmp_path):
    image = Image.new("RGB", (32, 32), "red")
    image.putalpha(right_half(32, 32))
    image.save(tmp_path / "a.png")
    image.putalpha(255)
    image.save(tmp_path / "b.png")
    a, b = read_photos(tmp_path)[0]
    assert a.transparent and not b.transparent and b.open_mask() is None
    mask = a.open_mask()
    assert mask is not None and mask.tobytes() == right_half(32, 32).tobytes()
    Image.new("L", (32, 32), 255).save(tmp_path / "a-mask.png")
    mask = read_photos(tmp_path)[0][0].open_mask()
    assert mask is not None and mask.getextrema() == (255, 255)


def test_a_mask_is_turned_upright_with_its_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.new("RGB", (32, 32), "red")
    image.putalpha(right_half(32, 32))
    image.save(tmp_path / "a.png", exif=exif)
    mask = read_photos(tmp_path)[0][0].open_mask()
    assert mask is not None and mask.getpixel((2, 2)) == 255 and mask.getpixel((30, 2)) == 0


def test_a_mask_is_cut_and_mirrored_as_its_picture(folder):
    right_half(64, 32).save(folder / "a-mask.png")
    (views,) = items(folder, flip=True, crop="random", seed=1)
    photo = right_half(64, 32).convert("RGB")
    for item in views:
        mask = item.mask(32)
        assert mask is not None and mask.shape == (32, 32)
        left = round(item.place[0] * 32)
        expected = np.asarray(photo.crop((left, 0, left + 32, 32)))[..., 0] / 255
        expected = expected[:, ::-1] if item.flip else expected
        assert abs(mask.numpy() - expected).mean() < 0.03
    (wide,) = items(folder, buckets=[(32, 32), (64, 32)])
    mask = wide[0].mask(32)
    assert mask is not None and mask.shape == (32, 64)


def test_a_mask_is_read_once_for_all_views_of_its_photo(folder, monkeypatch):
    right_half(64, 32).save(folder / "a-mask.png")
    (views,) = items(folder, flip=True, crop="random", seed=1)
    read, calls = images._read_mask, []
    monkeypatch.setattr(images, "_read_mask", lambda *a: calls.append(1) or read(*a))
    masks = [item.mask(32) for item in views]
    assert len(masks) > 4 and len(calls) == 1


def test_latent_weights_are_means_of_pixels_lifted_to_the_background():
    mask = torch.zeros(4, 8)
    mask[:2, :4] = 1.0
    mask[2, 0] = 1.0
    weights = latent_weights(mask, (2, 2), background=0.2)
    assert torch.allclose(weights, torch.tensor([[[1.0, 0.2], [0.2 + 0.8 / 8, 0.2]]]))
    assert torch.equal(latent_weights(mask, (4, 8), 0.0)[0], mask)
    assert torch.equal(latent_weights(mask, (2, 4), 1.0), torch.ones(1, 2, 4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (64, 32), 0), "a-mask.png: the mask is all black; white is what is learnt"),
        (Image.new("L", (32, 32), 255), "a mask of 32 x 32 px for a photo of 64 x 32"),
    ],
)
def test_unusable_masks_are_named(folder, mask, message):
    mask.save(folder / "a-mask.png")
    (photo,) = read_photos(folder)[0]
    with pytest.raises(UserError, match=message):
        photo.open_mask()
