"""Items and their order."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nora_diffusion.data.dataset import (
    RANDOM_CROPS,
    Dataset,
    class_items,
    class_prompt,
    subject_views,
)
from nora_diffusion.data.images import Photo, read_photos


@pytest.fixture
def photos(tmp_path) -> list[Photo]:
    """A square, a wide and a tall photo; the wide one has a caption."""
    for name, size in (("a", (32, 32)), ("b", (64, 32)), ("c", (32, 64))):
        ramp = np.linspace(0, 255, size[0] * size[1] * 3, dtype=np.uint8)
        Image.fromarray(ramp.reshape(size[1], size[0], 3)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("{trigger} the {class_name} on a sofa")
    return read_photos(tmp_path)[0]


def fake_photos(count: int, name: str = "p") -> list[Photo]:
    """Photos that are only ever counted."""
    return [Photo(Path(f"{name}{i}.png"), (8, 8), f"{name}{i}") for i in range(count)]


def views(photos, **options):
    return subject_views(photos, trigger="sks", class_name="dog", **options)


def test_prompts(photos):
    assert [items[0].prompt for items in views(photos)] == [
        "a sks dog",
        "sks the dog on a sofa",
        "a sks dog",
    ]
    assert {items[0].prompt for items in views(photos, captions=False)} == {"a sks dog"}


@pytest.mark.parametrize(
    ("class_name", "prompt"),
    [
        ("dog", "a dog"),
        ("elephant", "an elephant"),
        ("Owl", "an Owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("{x}", "a {x}"),
    ],
)
def test_class_prompts_have_the_right_article(class_name, prompt):
    assert class_prompt(class_name) == prompt


def test_class_images_are_items_with_another_weight(photos):
    items = class_items(photos, "dog", 0.5)
    assert {(item.prompt, item.weight) for item in items} == {("a dog", 0.5)}


def test_pixels_are_in_range_and_upright(photos):
    item = views(photos)[0][0]
    pixels = item.pixels(32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    stored = np.asarray(photos[0].open(), dtype=np.float32)
    assert torch.equal(pixels, torch.from_numpy(stored / 127.5 - 1).permute(2, 0, 1))
    assert pixels.min() == -1 and pixels.max() == 1


def test_flips_double_the_views_and_mirror_the_pixels(photos):
    (plain, mirrored), *_ = views(photos, flip=True)
    assert torch.equal(plain.pixels(32), mirrored.pixels(32).flip(-1))
    assert plain.image_id != mirrored.image_id


def test_random_crops_move_along_the_longer_side_only(photos):
    square, wide, tall = views(photos, crop="random", seed=3)
    assert (len(square), len(wide), len(tall)) == (1, RANDOM_CROPS, RANDOM_CROPS)
    assert len({item.image_id for item in wide}) == RANDOM_CROPS
    assert wide[0].place != tall[0].place
    assert not torch.equal(wide[0].pixels(32), wide[1].pixels(32))
    assert views(photos, crop="random", seed=3)[1] == wide
    assert views(photos, crop="random", seed=4)[1] != wide


def test_equal_pixels_share_a_name_whatever_the_prompt_or_weight(photos):
    assert views(photos)[1][0].image_id == class_items(photos, "dog", 0.1)[1].image_id


counts = st.integers(1, 20)


@given(photos=counts, flips=st.booleans(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 99))
def test_an_epoch_shows_every_photo_once(photos, flips, seed, epoch):
    items = views(fake_photos(photos), flip=flips)
    dataset = Dataset(items, seed=seed)
    shown = [dataset.items[i].photo.digest for i in dataset.epoch(epoch)]
    assert sorted(shown) == sorted(photo.digest for photo in fake_photos(photos))
    assert dataset.epoch(epoch) == Dataset(items, seed=seed).epoch(epoch)


@given(
    photos=counts,
    priors=st.integers(0, 30),
    position=st.integers(0, 200),
    sizes=st.lists(st.integers(0, 9), max_size=6),
)
def test_batches_are_windows_of_one_endless_order(photos, priors, position, sizes):
    """However a run is cut into batches and resumed, it sees the same items in the same order."""
    dataset = Dataset(views(fake_photos(photos)), class_items(fake_photos(priors, "c"), "dog", 1.0))
    length = position + sum(sizes)
    order: list[int] = []
    for epoch in range(length // dataset.epoch_length + 1):
        order += dataset.epoch(epoch)
    at = position
    for size in sizes:
        assert dataset.batch(at, size) == order[at : at + size]
        at += size


@given(photos=counts, priors=st.integers(1, 30), seed=st.integers(0, 9))
def test_class_images_alternate_with_photos_and_are_used_evenly(photos, priors, seed):
    subject, prior = views(fake_photos(photos)), class_items(fake_photos(priors, "c"), "dog", 0.5)
    dataset = Dataset(subject, prior, seed)
    order = dataset.batch(0, 4 * priors)
    weights = [dataset.items[i].weight for i in order]
    assert weights == [1.0, 0.5] * (2 * priors)
    assert set(Counter(order[1::2]).values()) == {2}
    assert set(order[1 : 2 * priors : 2]) == set(order[2 * priors + 1 :: 2])


def test_orders_differ_between_epochs_and_seeds():
    items = views(fake_photos(10))
    epochs = [Dataset(items, seed=0).epoch(epoch) for epoch in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert Dataset(items, seed=1).epoch(0) != epochs[0]
    assert any(a[-1] != b[-1] for a, b in pairwise(epochs))


def test_views_are_used_evenly():
    dataset = Dataset(views(fake_photos(1), flip=True))
    mirrored = sum(dataset.items[dataset.epoch(epoch)[0]].flip for epoch in range(400))
    assert 150 < mirrored < 250


def test_the_order_is_written_down():
    """Seed 0 gave this order in the first release: a change breaks resuming older runs."""
    order = [2, 1, 0, 3, 4, 2, 4, 3, 1, 0, 0, 3]
    assert Dataset(views(fake_photos(5))).batch(0, 12) == order


@pytest.mark.parametrize("subject", [[], [[]]])
def test_a_dataset_without_photos_is_refused(subject):
    with pytest.raises(ValueError, match="at least one subject photo"):
        Dataset(subject)
