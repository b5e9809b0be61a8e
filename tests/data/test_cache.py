"""Encoded pictures: each once, never another run's, never a torn file."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from nora_diffusion.config import UserError
from nora_diffusion.data.cache import encode_items
from nora_diffusion.data.dataset import Item, class_items
from nora_diffusion.data.images import read_photos

MODEL = {"vae": "abc", "dtype": "fp32"}


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """Three pictures; the third has the bytes of the first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, level in (("a", 40), ("b", 90), ("c", 40)):
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(folder / f"{name}.png")
    return class_items(read_photos(folder)[0], "dog", 1.0)


class Encoder:
    """Averages 8x8 blocks, counting what it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.avg_pool2d(pixels, 8)


def test_equal_pictures_are_encoded_once(items):
    encoder = Encoder()
    latents = encode_items(items, encoder, resolution_px=16, model=MODEL)
    assert encoder.calls == len(latents) == 2
    for item in items:
        expected = encoder(item.pixels(16)[None])[0]
        assert torch.equal(latents[item.image_id], expected)


def test_a_second_run_encodes_nothing_and_gets_the_same_bits(items, tmp_path):
    folder = tmp_path / "cache"
    first = encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
    encoder = Encoder()
    second = encode_items(items, encoder, resolution_px=16, model=MODEL, folder=folder)
    assert encoder.calls == 0
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change",
    [
        {"resolution_px": 8},
        {"model": {**MODEL, "vae": "abd"}},
        {"model": {**MODEL, "dtype": "bf16"}},
    ],
)
def test_what_latents_depend_on_is_in_the_key(items, tmp_path, change):
    folder = tmp_path / "cache"
    usual = {"resolution_px": 16, "model": MODEL, "folder": folder}
    encode_items(items, Encoder(), **usual)
    encoder = Encoder()
    encode_items(items, encoder, **{**usual, **change})
    assert encoder.calls == 2


def test_another_crop_is_another_picture(items, tmp_path):
    folder = tmp_path / "cache"
    encode_items(items[:1], Encoder(), resolution_px=16, model=MODEL, folder=folder)
    encoder = Encoder()
    other = Item(items[0].photo, "a dog", place=(0.25, 0.25))
    encode_items([other], encoder, resolution_px=16, model=MODEL, folder=folder)
    assert encoder.calls == 1


def rewritten(change):
    """Damage that leaves a safetensors file, with another latent beside the same digest."""

    def damage(data: bytes) -> bytes:
        tensors = load(data)
        return save({**tensors, "latent": change(tensors["latent"])})

    return damage


DAMAGES = {
    "empty": lambda data: b"",
    "not safetensors": lambda data: b"\xff" * 40,
    "cut": lambda data: data[:-3],
    "another shape": rewritten(lambda latent: latent[:, :1].clone()),
    "NaN": rewritten(lambda latent: latent * float("nan")),
    "another dtype": rewritten(lambda latent: latent.half()),
    "another value": rewritten(lambda latent: latent + 1),
    "no digest": lambda data: save({"latent": load(data)["latent"]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_encoded_again(items, tmp_path, damage):
    folder = tmp_path / "cache"
    first = encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
    for path in folder.iterdir():
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    encoder = Encoder()
    second = encode_items(items, encoder, resolution_px=16, model=MODEL, folder=folder)
    assert encoder.calls == 2
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors"] * 2


def test_files_that_changed_places_are_encoded_again(items, tmp_path):
    folder = tmp_path / "cache"
    first = encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
    (one, other), contents = folder.iterdir(), [path.read_bytes() for path in folder.iterdir()]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    second = encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_photo_that_changes_while_pictures_are_encoded_is_named_and_never_kept(items, tmp_path):
    folder, photo = tmp_path / "cache", items[0].photo.path
    before = photo.read_bytes()
    for change in (photo.unlink, lambda: photo.write_bytes(items[1].photo.path.read_bytes())):
        change()
        with pytest.raises(UserError, match=r"a\.png: this photo .* resume"):
            encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
        assert not folder.exists()
        photo.write_bytes(before)


def test_a_disk_that_takes_no_files_costs_only_a_warning(items, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="encoded pictures are not kept"):
        latents = encode_items(
            items, Encoder(), resolution_px=16, model=MODEL, folder=Path(blocked) / "cache"
        )
    assert len(latents) == 2


def test_a_disk_that_takes_no_files_is_warned_of_once(items, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            encode_items(items, Encoder(), resolution_px=16, model=MODEL, folder=folder)
    assert len(told) == 1 and str(folder) in str(told[0].message)


def not_finite(pixels):
    return pixels * float("nan")


def refusing(pixels):
    raise ValueError("the autoencoder answered NaN")


@pytest.mark.parametrize("encode", [not_finite, refusing])
def test_a_photo_that_cannot_be_encoded_is_named_and_not_kept(items, tmp_path, encode):
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match=r"a\.png: the base model cannot encode it .*fp32"):
        encode_items(items, encode, resolution_px=16, model=MODEL, folder=folder)
    assert not folder.exists()
