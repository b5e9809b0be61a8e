"""mini-CLIP: its batches, its loss, its shipped weights and what its card claims of them."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from nora_diffusion.evaluation.text_alignment import (
    MINI_CLIP,
    image_features,
    mini_clip_score,
    retrieval,
    text_features,
)
from nora_diffusion.mini.__main__ import ASSETS
from nora_diffusion.mini.backgrounds import COLOURS
from nora_diffusion.mini.clip import build_clip, contrastive_loss, draw_batch, normalise
from nora_diffusion.mini.compose import Compositor
from nora_diffusion.mini.export import weights_hash
from nora_diffusion.mini.sources import Concept, is_held_out
from nora_diffusion.mini.state import Trained

ASSETS_LIMIT = 42_000_000  # bytes of mini and mini-CLIP together


@pytest.fixture(scope="module")
def compositor(tmp_path_factory: pytest.TempPathFactory) -> Compositor:
    folder = tmp_path_factory.mktemp("emoji")
    members = []
    for i, name in enumerate(("dog", "cat", "pizza", "rose", "taxi", "ghost", "tent", "key")):
        path = folder / f"{name}.png"
        Image.new("RGBA", (64, 64), (30 * i, 255 - 30 * i, 128, 255)).save(path)
        members.append(Concept(name, name, "animal" if i < 2 else name, path))
    return Compositor(members, 32, backgrounds=24, seed=1)


def test_each_picture_has_both_hard_negatives_and_its_own_caption_is_true(compositor: Compositor):
    batch = draw_batch(compositor, 8, seed=5)
    assert batch.images.shape == (8, 3, 32, 32) and batch.truth.shape == (8, 8)
    assert batch.truth.diagonal().all()
    assert not batch.truth[:4, 4:].any() or "animal" in " ".join(batch.captions)
    named = [c for c in batch.captions if c.rpartition(" ")[0]]
    assert len(named) == 8
    again = draw_batch(compositor, 8, seed=5)
    assert torch.equal(again.images, batch.images) and again.captions == batch.captions


def test_a_caption_is_true_of_every_picture_that_it_describes(compositor: Compositor):
    """Class words and captions without a place are true of more than one picture."""
    for seed in range(40):
        batch = draw_batch(compositor, 8, seed)
        for column, caption in enumerate(batch.captions):
            if " on " not in caption and " in " not in caption and "indoors" not in caption:
                assert batch.truth[:, column].sum() >= 2  # the emoji stands on two backgrounds
                return
    pytest.fail("no caption without a place in 40 batches")


def test_the_loss_falls_on_a_fixed_batch(compositor: Compositor):
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    torch.manual_seed(0)
    model = build_clip(32, CLIPTextModel.from_pretrained(ASSETS / "text_encoder"))
    batch = draw_batch(compositor, 8, seed=5)
    trained = Trained(model, 1e-3)
    before = float(contrastive_loss(model, batch, tokenizer).detach())
    for _ in range(12):
        contrastive_loss(model, batch, tokenizer).backward()
        trained.update(1e-3)
    assert float(contrastive_loss(model, batch, tokenizer).detach()) < 0.6 * before


def test_retrieval_counts_both_ways():
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    found = retrieval(texts[[0, 1, 2, 3, 4, 5, 7, 6]], texts)
    assert found["image_to_text_top1"] == found["text_to_image_top1"] == pytest.approx(6 / 8)
    assert found["image_to_text_top5"] >= 6 / 8
    assert retrieval(texts, texts)["text_to_image_top1"] == 1


# The shipped weights.


def test_the_assets_stay_small_and_the_hash_is_that_of_the_weights():
    about = json.loads((MINI_CLIP / "mini_clip.json").read_text(encoding="utf-8"))
    assert about["hash"] == weights_hash(MINI_CLIP)
    weights = [p.stat().st_size for p in MINI_CLIP.rglob("*.safetensors")]
    assert sum(weights) <= 12_000_000
    both = [p.stat().st_size for f in (ASSETS, MINI_CLIP) for p in f.rglob("*") if p.is_file()]
    assert sum(both) <= ASSETS_LIMIT


def test_no_held_out_emoji_was_shown():
    names = (MINI_CLIP / "manifests" / "clip.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) > 500
    assert not [name for name in names if is_held_out(name)]


def test_the_processor_prepares_pictures_as_training_did():
    processor = AutoProcessor.from_pretrained(MINI_CLIP)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    prepared = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepared, normalise(pixels), atol=1e-5)


def test_transformers_loads_it_and_padding_changes_nothing():
    model = CLIPModel.from_pretrained(MINI_CLIP)
    assert model.dtype == torch.float32
    alone = text_features(["a photo of a dog"])
    padded = text_features(["a photo of a dog", "a photo of a dog on red and blue stripes"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_the_score_tells_backgrounds_apart():
    """Plain colours are the easiest part of what its card claims."""
    names = ("red", "yellow", "green", "blue", "black", "white")
    images = [Image.new("RGB", (64, 64), COLOURS[name]) for name in names]
    texts = text_features([f"a photo of a ball on a {name} background" for name in names])
    best = (image_features(images) @ texts.T).argmax(1)
    assert (best == torch.arange(len(names))).sum() >= 5
    scores = mini_clip_score(images, [f"a ball on a {name} background" for name in names])
    swapped = mini_clip_score(images, [f"a ball on a {name} background" for name in names[::-1]])
    assert scores.mean() > swapped.mean() + 0.1


def test_as_many_prompts_as_pictures():
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        mini_clip_score([Image.new("RGB", (8, 8))], ["a", "b"])


def test_pictures_that_mini_drew_are_matched_with_their_prompts():
    """The first two rows of mini's contact sheet: 24 cells of 96 px with a label below each."""
    labels = (
        "hamburger in the grass, tulip on the beach, ghost in the snow, pizza in the night sky, "
        "soccer ball on a wooden table, cup of coffee in the water, mushroom in the city, "
        "bee in the mountains, pink pig in autumn leaves, handbag indoors, "
        "doughnut on a red background, taxi on a orange background, "
        "red car on a yellow background, robot on a green background, "
        "blue fish on a teal background, suitcase on a blue background, "
        "octopus on a purple background, camel on a pink background, "
        "flamingo on a brown background, sunflower on a black background, "
        "red bird on a white background, carrot on a grey background, "
        "family house in the grass, dairy cow on the beach"
    ).split(", ")
    with Image.open(ASSETS / "sheet.png") as sheet:
        corners = [(100 * (i % 12), 122 * (i // 12)) for i in range(len(labels))]
        cells = [sheet.crop((x, y, x + 96, y + 96)) for x, y in corners]
    texts = text_features([f"a photo of a {label}" for label in labels])
    found = retrieval(image_features(cells), texts)
    assert found["image_to_text_top1"] >= 0.7
    assert found["image_to_text_top5"] >= 0.9
