"""Composites and captions: placement, determinism, wording."""

from random import Random

import pytest
import torch
from PIL import Image

from nora_diffusion.mini.backgrounds import COLOURS, SCENES, draw_background
from nora_diffusion.mini.compose import Compositor, Placement, caption, nonsense_word
from nora_diffusion.mini.sources import Concept


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> list[Concept]:
    """A red square and a picture that is red on its left and blue on its right."""
    folder = tmp_path_factory.mktemp("emoji")
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(folder / "square.png")
    halves = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    halves.paste((0, 0, 255, 255), (32, 0, 64, 64))
    halves.save(folder / "halves.png")
    names = ("square", "halves")
    return [Concept(n, n, "shape", folder / f"{n}.png") for n in names]


@pytest.fixture(scope="module")
def compositor(concepts: list[Concept]) -> Compositor:
    made = Compositor(concepts, 32, backgrounds=3)
    made.backgrounds = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    return made


def test_scale_and_place_are_those_asked_for(compositor: Compositor):
    centred = Placement(scale=0.5, x=0, y=0, angle=0, flip=False)
    moved = Placement(scale=0.5, x=0.5, y=-0.5, angle=0, flip=False)
    images = compositor.render([0, 0], [0, 0], [centred, moved])
    red = images[:, 0] > 128
    assert red[0].sum() == 16 * 16 and red[0, 8:24, 8:24].all()
    assert red[1].sum() == 16 * 16 and red[1, 0:16, 16:32].all()


def test_flip_mirrors_the_emoji(compositor: Compositor):
    plain, flipped = (Placement(0.9, 0, 0, 0, flip) for flip in (False, True))
    images = compositor.render([1, 1], [0, 0], [plain, flipped])
    assert torch.equal(images[1], images[0].flip(-1))


def test_the_same_seed_gives_the_same_composites(compositor: Compositor):
    first, second, other = (compositor.sample(6, seed) for seed in (4, 4, 5))
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]
    assert first[1] != other[1]


def test_every_named_background_draws_and_says_its_name():
    for where in [*SCENES, *(f"on a {c} background" for c in COLOURS)]:
        image, phrase = draw_background(24, Random(0), where)
        assert image.shape == (3, 24, 24) and phrase == where


def test_a_plain_background_has_its_colour():
    image, _ = draw_background(16, Random(0), "on a blue background")
    mean = image.reshape(3, -1).mean(1)
    assert mean == pytest.approx(COLOURS["blue"], abs=12)


def test_an_unknown_background_is_refused():
    with pytest.raises(ValueError, match="on the moon"):
        draw_background(16, Random(0), "on the moon")


def test_captions_name_the_emoji_or_its_class_and_mostly_the_background(concepts: list[Concept]):
    random = Random(0)
    texts = [caption(concepts[0], "in the snow", 0.6, random) for _ in range(400)]
    assert all("square" in t or "shape" in t for t in texts)
    assert 0.85 < sum(t.endswith("in the snow") for t in texts) / 400 < 1
    assert sum("shape" in t for t in texts) / 400 == pytest.approx(0.25, abs=0.08)
    assert not any("small" in t or "big" in t for t in texts)
    assert any("small" in caption(concepts[0], "", 0.42, random) for _ in range(40))


def test_nonsense_words_are_three_to_six_letters():
    words = {nonsense_word(Random(i)) for i in range(300)}
    assert len(words) > 250
    assert {len(w) for w in words} == {3, 4, 5, 6} and all(w.isalpha() for w in words)
