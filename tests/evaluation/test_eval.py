"""``nora eval``: its numbers on features that are known, and the command on mini."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from torch.nn import functional as F

from nora_diffusion import NoraConfig, load_pipeline, save_adapter
from nora_diffusion.cli import main
from nora_diffusion.config import UserError
from nora_diffusion.evaluation.backends import Backend, load_backend
from nora_diffusion.evaluation.eval_run import _subject, default_prompts, read_prompts
from nora_diffusion.evaluation.prompts import LIVE, MINI, OBJECT, without_trigger
from nora_diffusion.evaluation.protocol import Pictures, measure

ROOT = Path(__file__).parents[2]
RED, GREEN, BLUE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def plain(colour):
    return Image.new("RGB", (4, 4), colour)


def colour_of(images):
    """A backend whose features are mean colours: equal colours have cosine 1, red and green 0."""
    pixels = [torch.tensor(list(image.convert("RGB").get_flattened_data())) for image in images]
    return F.normalize(torch.stack([p.float().mean(0) for p in pixels]), dim=1)


def text_colours(texts):
    named = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0)}
    return torch.tensor([named[text] for text in texts])


def pictures(adapted, held_out=(RED,), training=(RED, RED)):
    rows = {
        "base": [[GREEN, GREEN], [GREEN, GREEN]],
        "adapted": adapted,
        "base_class": [[GREEN, GREEN], [GREEN, GREEN]],
        "adapted_class": [[GREEN, RED], [GREEN, RED]],
    }
    shown = {name: [[plain(c) for c in row] for row in of_kind] for name, of_kind in rows.items()}
    return Pictures(
        **shown,
        training=[plain(c) for c in training],
        held_out=[plain(c) for c in held_out],
        class_prompts=["green", "red"],
    )


COLOURS = Backend("mean colour", colour_of, text_colours)


def test_half_of_the_pictures_right_close_half_of_the_gap():
    found = measure(pictures([[RED, GREEN], [RED, GREEN]]), COLOURS)
    assert found["held_out"] == pytest.approx(
        {"base": 0, "adapted": 0.5, "ceiling": 1, "gap_closed": 0.5}
    )
    assert found["diversity"] == pytest.approx({"base": 0, "adapted": 1, "photos": 0})
    assert found["drift"] == pytest.approx({"moved": 0.5, "nearer_to_subject": 0.5})


def test_a_copy_of_the_training_photos_shows():
    """Closer to what was trained on than to other photos of the subject."""
    found = measure(pictures([[BLUE] * 2] * 2, held_out=[RED], training=[BLUE, BLUE]), COLOURS)
    assert found["training"]["gap_closed"] == pytest.approx(1)
    assert found["held_out"]["adapted"] == pytest.approx(0)
    assert found["held_out"]["gap_closed"] is None  # real photos are no nearer than the base's


def test_text_alignment_is_to_the_prompt_of_each_row():
    found = measure(pictures([[GREEN, GREEN], [RED, RED]]), COLOURS)
    assert found["text"] == pytest.approx({"base": 0.5, "adapted": 1})


def test_a_backend_that_knows_no_subjects_scores_texts_alone():
    found = measure(pictures([[RED] * 2] * 2), Backend("x", colour_of, text_colours, False))
    assert set(found) == {"backend", "text"}


def test_without_held_out_photos_there_is_no_score_for_them():
    found = measure(pictures([[RED] * 2] * 2, held_out=()), COLOURS)
    assert "held_out" not in found and found["training"]["gap_closed"] == pytest.approx(1)


def test_prompt_lists():
    assert len(MINI) == len(OBJECT) == len(LIVE) == 25
    given = (ROOT / "sample_data" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert list(MINI) == given
    assert without_trigger(LIVE[0], "dog") == "a dog in the jungle"
    assert default_prompts("mini", "dog") == default_prompts("mini-128", "dog") == "mini"
    assert default_prompts("x/sd15", "corgi dog") == "live"
    assert default_prompts("x/sd15", "teapot") == "object"
    assert default_prompts("x/sd15", "stuffed animal") == "object"  # as DreamBench has it


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {trigger} {class_name} here\n\n")
    assert read_prompts(str(file)) == ["a {trigger} {class_name} here"]
    file.write_text("a {class_name} here\n")
    with pytest.raises(UserError, match="holds no {trigger}"):
        read_prompts(str(file))
    with pytest.raises(UserError, match="neither mini, object, live nor a file"):
        read_prompts("objects")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vgg", "there is no such backend; choose from effnet"),
        ("dino=/nowhere", "DINO ViT-S/16 cannot be loaded from /nowhere"),
        ("effnet=/nowhere", "there is no such backend"),
    ],
)
def test_backends_that_cannot_be_had(spec, message):
    with pytest.raises(UserError, match=message):
        load_backend(spec, torch.device("cpu"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on mini that changes its pictures."""
    pipe = load_pipeline("mini")
    config = NoraConfig(r=4, inner_r=2, target_modules=["to_q"], init_weights=False)
    pipe.unet.add_adapter(config, "default")
    path = tmp_path_factory.mktemp("run") / "adapter.safetensors"
    about = {"base": "mini", "trigger": "sks", "class_name": "flower"}
    return save_adapter(pipe, path, metadata=about)


@pytest.fixture
def command(adapter, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {trigger} {class_name} in the snow\na {trigger} {class_name} indoors\n")
    photos = ROOT / "sample_data" / "subject"
    return [
        "eval", str(adapter), "--photos", str(photos), "--prompts", str(prompts), "--n", "1",
        "--steps", "2", "--backend", "effnet", "mini_clip", "--out", str(tmp_path / "eval"),
    ]  # fmt: skip


def test_the_command_draws_measures_and_goes_on(command, tmp_path, capsys):
    out = tmp_path / "eval"
    assert main(command) == 0
    first = json.loads((out / "eval.json").read_text())
    assert [found["backend"] for found in first["backends"]] == ["EffNet-Lite2", "mini-CLIP"]
    assert first["base"] == "mini" and first["training_photos"] == 5
    drift = first["backends"][0]["drift"]["moved"]
    assert drift > 0  # the adapter was on, and the base's pictures were made without it
    page = (out / "index.html").read_text()
    pictures = sorted(out.glob("pictures/*/*.png"))
    assert len(pictures) == 8 and all(str(p.relative_to(out)) in page for p in pictures)
    assert "sks flower in the snow" in page and "EffNet-Lite2" in (out / "eval.md").read_text()

    kept = {p: p.stat().st_mtime_ns for p in pictures}
    lost = out / "pictures" / "adapted" / "01-seed0.png"
    before = Image.open(io.BytesIO(lost.read_bytes()))
    lost.unlink()
    assert main(command) == 0
    again = json.loads((out / "eval.json").read_text())
    # Drawn in another batch, so that sums round in another order.
    assert again["backends"][0]["training"] == pytest.approx(
        first["backends"][0]["training"], abs=1e-2
    )
    levels = ImageChops.difference(Image.open(lost).convert("RGB"), before.convert("RGB"))
    assert max(high for _, high in levels.getextrema()) <= 3
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items() if p != lost)

    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_trigger_word_that_was_not_trained_is_refused(command, capsys):
    assert main([*command, "--trigger", "zwx"]) == 2
    assert "--trigger zwx" in capsys.readouterr().err


def test_of_several_subjects_one_is_chosen():
    about = {"trigger": "sks", "class_name": "dog", "metadata": {}}
    assert _subject(about, Path("a"), None) == ("sks", "dog")
    both = [{"trigger": "sks", "class_name": "dog"}, {"trigger": "zwx", "class_name": "mug"}]
    assert _subject(about | {"metadata": {"subjects": both}}, Path("a"), "zwx") == ("zwx", "mug")


def test_held_out_photos_that_were_trained_on_are_refused(command, tmp_path, capsys):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    training = sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))
    (held_out / "copy.jpg").write_bytes(training[0].read_bytes())
    Image.new("RGB", (64, 64)).save(held_out / "new.png")
    assert main([*command, "--held-out", str(held_out)]) == 2
    err = capsys.readouterr().err
    assert f"--held-out {held_out}: 1 of its 2 photos are training photos: copy.jpg" in err
    assert training[0].name in err and not (tmp_path / "eval").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(command, tmp_path, capsys):
    (tmp_path / "eval").touch()
    assert main(command) == 2
    assert f"--out {tmp_path / 'eval'}: is a file" in capsys.readouterr().err


def test_an_adapter_alone_needs_its_photos(command, capsys):
    at = command.index("--photos")
    assert main([*command[:at], *command[at + 2 :]]) == 2
    assert "--photos FOLDER" in capsys.readouterr().err


def test_hub_backends_from_a_folder(tmp_path):
    """DINO's, DINOv2's and CLIP's kinds of model, tiny and random."""
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Dinov2Config,
        Dinov2Model,
        PreTrainedTokenizerFast,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    ViTModel(ViTConfig(**small, intermediate_size=32, image_size=32)).save_pretrained(
        tmp_path / "dino"
    )
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "dino")
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(
        tmp_path / "dinov2"
    )
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "dinov2")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        ROOT / "nora_diffusion" / "assets" / "mini_clip"
    )
    text = {**small, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    text |= {"eos_token_id": tokenizer.eos_token_id, "projection_dim": 8}
    vision = {**small, "intermediate_size": 32, "image_size": 32, "patch_size": 16}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer
    ).save_pretrained(tmp_path / "clip")

    images = [plain(RED).resize((40, 60)), plain(GREEN).resize((64, 32))]
    for name, width in (("dino", 16), ("dinov2", 16), ("clip", 8)):
        backend = load_backend(f"{name}={tmp_path / name}", torch.device("cpu"))
        features = backend.embed(images)
        assert features.shape == (2, width)
        assert torch.allclose(features.norm(dim=1), torch.ones(2))
        assert not torch.allclose(features[0], features[1])
    texts = backend.embed_texts(["a dog", "a photo of a cat in the snow"])
    assert texts.shape == (2, 8) and torch.allclose(texts.norm(dim=1), torch.ones(2))
