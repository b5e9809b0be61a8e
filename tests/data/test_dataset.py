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
    COLOUR_VARIANTS,
    RANDOM_CROPS,
    Dataset,
    Item,
    class_items,
    class_prompt,
    dropped,
    subject_views,
    without_trigger,
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


# ---- buckets, repeats, several classes, colours, dropout ------------------------------------


def of_sizes(counts: dict[tuple[int, int], int], class_name: str = "dog") -> list[list[Item]]:
    """A view each of ``counts[bucket]`` photos a bucket."""
    return [
        [Item(photo, "a sks dog", bucket=bucket, class_name=class_name)]
        for bucket, count in counts.items()
        for photo in fake_photos(count, f"{class_name}{bucket}")
    ]


shapes = st.dictionaries(
    st.sampled_from([(64, 64), (80, 48), (48, 80)]), st.integers(1, 7), min_size=1
)


@given(counts=shapes, size=st.integers(1, 5), seed=st.integers(0, 9), batches=st.integers(1, 40))
def test_batches_are_full_of_one_size_and_every_photo_has_its_share(counts, size, seed, batches):
    dataset = Dataset(of_sizes(counts), seed=seed)
    laid = [dataset.batch_of_one_size(number, size) for number in range(batches)]
    assert all(len(batch) == size for batch in laid)
    assert all(len({dataset.items[i].bucket for i in batch}) == 1 for batch in laid)
    shown = Counter(index for batch in laid for index in batch)
    for (
        bucket
    ) in counts:  # within a bucket nobody is a whole round ahead, but for one epoch's order
        times = [shown[i] for i, item in enumerate(dataset.items) if item.bucket == bucket]
        assert max(times) - min(times) <= 2
    fresh = Dataset(of_sizes(counts), seed=seed)  # as after a resume
    assert fresh.batch_of_one_size(batches - 1, size) == laid[-1]


def test_over_a_run_a_rare_size_is_shown_as_often_as_a_common_one():
    dataset = Dataset(of_sizes({(64, 64): 4, (80, 48): 1}))
    laid = [dataset.batch_of_one_size(number, 4) for number in range(1000)]
    shown = Counter(index for batch in laid for index in batch)
    assert all(abs(times - 800) <= 4 for times in shown.values())


def test_equal_sizes_go_in_the_usual_order():
    plain, buckets = Dataset(views(fake_photos(5))), Dataset(of_sizes({(64, 64): 5}))
    for number in range(9):
        assert buckets.batch_of_one_size(number, 3) == plain.batch(3 * number, 3)


def test_repeats_show_a_photo_more_often_with_views_of_its_own():
    dataset = Dataset(views(fake_photos(3), flip=True), repeats=[1, 3, 2])
    shown = Counter(dataset.items[i].photo.digest for i in dataset.epoch(4))
    assert shown == {"p0": 1, "p1": 3, "p2": 2} and dataset.epoch_length == 6
    items = [dataset.items[i] for i in dataset.epoch(4)]
    assert {item.flip for item in items if item.photo.digest == "p1"} == {True, False}
    assert Dataset(views(fake_photos(3)), repeats=[1, 1, 1]).epoch(7) == (
        Dataset(views(fake_photos(3))).epoch(7)
    )


@given(dogs=st.integers(1, 4), cats=st.integers(1, 4), priors=st.integers(1, 5))
def test_each_photo_is_followed_by_an_image_of_its_own_class(dogs, cats, priors):
    subject = of_sizes({(64, 64): dogs}) + of_sizes({(64, 64): cats}, "cat")
    prior = class_items(fake_photos(priors, "d"), "dog", 0.5)
    prior += class_items(fake_photos(2 * priors, "c"), "cat", 0.5)
    dataset = Dataset(subject, prior)
    order = [dataset.items[i] for i in dataset.batch(0, 12 * (dogs + cats))]
    assert all(
        photo.class_name == image.class_name and image.prior and not photo.prior
        for photo, image in zip(order[::2], order[1::2], strict=True)
    )
    for name, of_class in (("dog", priors), ("cat", 2 * priors)):
        images = [item.photo.digest for item in order[1::2] if item.class_name == name]
        whole = len(images) // of_class * of_class
        assert len(set(Counter(images[:whole]).values())) <= 1  # all once, then again


def test_a_class_without_images_has_none_between_its_photos():
    subject = of_sizes({(64, 64): 2}) + of_sizes({(64, 64): 2}, "cat")
    dataset = Dataset(subject, class_items(fake_photos(3, "d"), "dog", 0.5))
    assert dataset.epoch_length == 6
    assert sum(dataset.items[i].prior for i in dataset.epoch(0)) == 2


def test_colour_variants_are_seeded_mild_and_paired_with_crops(photos):
    square_, wide, _ = views(photos, color_jitter=0.1, crop="random", flip=True, seed=5)
    assert len(square_) == 2 * COLOUR_VARIANTS and len(wide) == 2 * RANDOM_CROPS
    assert square_[0].colour == wide[0].colour == (1.0, 1.0, 1.0)
    assert len({item.colour for item in wide}) == COLOUR_VARIANTS
    assert all(0.9 <= factor <= 1.1 for item in wide for factor in item.colour)
    assert wide == views(photos, color_jitter=0.1, crop="random", flip=True, seed=5)[1]
    plain, other = square_[0], square_[2]
    assert plain.image_id != other.image_id
    difference = (plain.pixels(32) - other.pixels(32)).abs()
    assert 0 < difference.mean() < 0.3
    assert torch.equal(plain.pixels(32), views(photos)[0][0].pixels(32))


def test_pictures_of_buckets_keep_more_of_the_photo(photos):
    _, wide, tall = views(photos, buckets=[(32, 32), (64, 32), (32, 64)])
    assert wide[0].pixels(32).shape == (3, 32, 64) and tall[0].pixels(32).shape == (3, 64, 32)
    stored = np.asarray(photos[1].open(), dtype=np.float32)
    assert torch.equal(wide[0].pixels(32), torch.from_numpy(stored / 127.5 - 1).permute(2, 0, 1))
    assert "64x32" in wide[0].image_id


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks dog", "a dog"),
        ("a sks dog on a sofa", "a dog on a sofa"),
        ("photo of sks, asleep", "photo of, asleep"),
        ("sks", "a dog"),
        ("a dog", "a dog"),
        ("a asks skss dog", "a asks skss dog"),
    ],
)
def test_prompts_without_the_trigger(prompt, expected):
    assert without_trigger(prompt, "sks", "dog") == expected
    assert without_trigger("a sks owl", "sks", "owl") == "an owl"


def test_dropout_draws_depend_on_seed_and_number_alone_and_are_uniform():
    assert dropped(3, 7, 4) == dropped(3, 7, 4) != dropped(3, 8, 4)
    draws = np.array([dropped(0, number, 4) for number in range(500)])
    assert draws.shape == (500, 2, 4) and abs(draws.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(draws[:, 0].ravel(), draws[:, 1].ravel())[0, 1]) < 0.1
