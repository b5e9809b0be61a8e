"""Runs on more than a folder of squares: buckets, several subjects, masks, dropout, variants."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion import adapter_info
from nora_diffusion.cli import main_dreambooth
from nora_diffusion.config import UserError, load_run
from nora_diffusion.events import read_events
from nora_diffusion.families.base import Framing
from nora_diffusion.settings import to_toml
from nora_diffusion.train import dreambooth
from nora_diffusion.train.common import TrainingInterrupted
from nora_diffusion.train.inputs import framing
from nora_diffusion.train.memory import plan_memory
from nora_diffusion.train.photos import scene_prompts
from tests.tiny import tiny_pipeline
from tests.train.conftest import counted_calls
from tests.train.test_dreambooth import assert_same, interrupt, prepared, trained


def photo(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def dog(tmp_path) -> Path:
    """Three wide photos, one of them with a caption and a mask, and a square one."""
    folder = tmp_path / "dog"
    for index, size in enumerate([(20, 12), (40, 24), (21, 13), (16, 16)]):
        photo(folder / f"{index}.png", size, index)
    (folder / "0.txt").write_text("a {trigger} {class_name} on a sofa")
    mask = Image.new("L", (20, 12), 0)
    mask.paste(255, (0, 0, 8, 12))
    mask.save(folder / "0-masklabel.png")
    return folder


@pytest.fixture
def cat(tmp_path) -> Path:
    folder = tmp_path / "cat"
    photo(folder / "a.png", (12, 20), 11)
    photo(folder / "b.png", (16, 16), 12)
    return folder


def two(dog: Path, cat: Path, **more) -> dict:
    return {
        "subject": None,
        "class_name": None,
        "subjects": [
            {"path": str(dog), "trigger": "sks", "class_name": "dog"},
            {"path": str(cat), "trigger": "zyx", "class_name": "cat", "repeats": 2},
        ],
        **more,
    }


EVERYTHING = {
    "buckets": True, "masks": True, "caption_dropout": 0.3, "trigger_dropout": 0.3,
    "color_jitter": 0.1, "flip": True, "crop": "random",
}  # fmt: skip


# ---- buckets --------------------------------------------------------------------------------


def test_a_run_on_buckets_never_mixes_shapes_and_shows_each_item_whole(make_config, dog, tmp_path):
    cfg = make_config(data={"subject": str(dog), "buckets": True}, train={"batch_size": 2})
    session = prepared(cfg, tmp_path)
    inputs = session.inputs
    assert {tuple(latent.shape) for latent in inputs.latents} == {(4, 6, 10), (4, 8, 8)}
    shapes = set()
    for number in range(12):
        batch = inputs.batch(number, 2)
        assert batch.latents.shape[0] == 2
        height, width = batch.latents.shape[-2:]
        assert {cut.target_px for cut in batch.framings} == {(2 * height, 2 * width)}
        shapes.add((height, width))
        session.step = number
        assert dreambooth.accumulate_gradients(session, 0) > 0
    assert shapes == {(6, 10), (8, 8)}


def test_framing_tells_what_was_cut_of_a_bucket(make_config, dog, tmp_path):
    """SDXL is told of photo, crop after scaling, and picture: (height, width), (top, left)."""
    photo(dog / "3.png", (30, 40), 5)  # tall: its bucket is 12 x 20, at 0.5 of its size
    cfg = make_config(data={"subject": str(dog), "buckets": True, "flip": True, "crop": "random"})
    items = prepared(cfg, tmp_path).inputs.dataset.items
    tall = [item for item in items if item.photo.path.name == "3.png"]
    assert len(tall) == 16 and {item.bucket for item in tall} == {(12, 20)}
    for item in tall:
        side = item.place[0] * 3  # 30 px at half size are 15, of which 12 are kept
        left = 3 - side if item.flip else side
        assert framing(item, 16) == Framing((40, 30), (0, round(left)), (20, 12))
    whole = next(item for item in items if item.photo.path.name == "0.png")
    assert framing(whole, 16) == Framing((12, 20), (0, 0), (12, 20))


def test_sdxl_is_told_of_each_photo_of_a_batch(make_config, dog, tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "sdxl")
    photo(dog / "4.png", (44, 24), 6)  # two columns are cut off on either side
    data = {"subject": str(dog), "buckets": True, "resolution_px": 32}
    cfg = make_config(model={"base": str(tmp_path / "sdxl"), "device": "cpu"}, data=data)
    session = prepared(cfg, tmp_path)
    inputs, told = session.inputs, set()
    for number in range(9):
        batch = inputs.batch(number, 3)
        given = session.family.frame(inputs.conditioning.select(batch.prompt_rows), batch.framings)
        told |= {tuple(row) for row in given.extra["time_ids"].int().tolist()}
        height, width = (2 * side for side in batch.latents.shape[-2:])
        assert {row[4:] for row in map(tuple, given.extra["time_ids"].tolist())} == {
            (height, width)
        }
    assert {(12, 20, 0, 0, 24, 40), (24, 44, 0, 2, 24, 40), (16, 16, 0, 0, 32, 32)} <= told
    assert dreambooth.accumulate_gradients(session, 0) > 0


def test_the_memory_plan_is_for_the_largest_bucket(make_config, dog, tmp_path):
    sizes = [(20, 12), (40, 24)]
    data = {"subject": str(dog), "buckets": True}
    square = plan_memory(make_config())
    cfg = make_config(data=data)
    assert plan_memory(cfg).activations == square.activations
    assert plan_memory(cfg, 1, [*sizes, (16, 16)]).activations == square.activations
    wide = plan_memory(cfg, 1, sizes)
    assert 0.85 * square.activations < wide.activations < square.activations
    session = prepared(cfg, tmp_path)
    latents = [latent for latent in session.inputs.latents if latent.shape[-1] == 10]
    one = plan_memory(cfg, 10, sizes).cache - plan_memory(cfg, 9, sizes).cache
    assert one == latents[0].nbytes


# ---- several subjects -----------------------------------------------------------------------


def test_each_subject_has_its_words_its_repeats_and_its_prior(make_config, dog, cat, tmp_path):
    cfg = make_config(data=two(dog, cat), train={"prior": "class_images", "prior_images": 2})
    inputs = prepared(cfg, tmp_path).inputs
    items = inputs.dataset.items
    assert {item.prompt for item in items} == {
        "a sks dog on a sofa", "a sks dog", "a zyx cat", "a dog", "a cat",
    }  # fmt: skip
    assert sum(item.prior for item in items) == 4
    assert inputs.class_prompts == ("a dog", "a cat")
    epoch = [items[i] for i in inputs.dataset.epoch(0)]
    assert sum(item.class_name == "cat" and not item.prior for item in epoch) == 4
    assert all(a.class_name == b.class_name for a, b in zip(epoch[::2], epoch[1::2], strict=True))
    made = list((tmp_path / "cache" / "class-images").iterdir())
    assert len(made) == 2  # a folder a class


def test_the_base_prediction_is_held_under_each_items_own_class(make_config, dog, cat, tmp_path):
    cfg = make_config(data=two(dog, cat), train={"prior": "base_prediction", "batch_size": 6})
    session = prepared(cfg, tmp_path)
    batch = session.inputs.batch(0, 6)
    assert set(batch.class_rows) == {0, 1}
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(0.1)
    seen = []
    frame = session.family.frame
    session.family.frame = lambda conditioning, cuts: (
        seen.append(conditioning) or frame(conditioning, cuts)
    )
    dreambooth._base_prediction_losses(session, batch, torch.Generator().manual_seed(0))
    rows = session.inputs.class_conditioning.prompt_embeds
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(seen[0].prompt_embeds, rows[list(batch.class_rows)])


def test_prompts_are_drawn_for_each_subject_they_name(make_config, dog, cat):
    sample = {"prompts": ["a {trigger} {class_name}", "a beach"], "n": 1, "steps": 1}
    cfg = make_config(data=two(dog, cat), sample=sample)
    assert scene_prompts(cfg) == ["a sks dog", "a zyx cat", "a beach"]
    assert scene_prompts(make_config(sample=sample)) == ["a sks toy", "a beach"]


def test_a_run_with_two_subjects_tells_of_both(make_config, dog, cat, tmp_path):
    cfg = make_config(data=two(dog, cat), train={"steps": 1, "batch_size": 1})
    run = dreambooth.run(cfg)
    assert load_run(run) == cfg
    info = adapter_info(run / "adapter.safetensors")
    assert (info["trigger"], info["class_name"]) == ("sks", "dog")
    named = [{"trigger": "sks", "class_name": "dog"}, {"trigger": "zyx", "class_name": "cat"}]
    assert json.loads(json.dumps(info))["metadata"]["subjects"] == named
    card = (run / "README.md").read_text()
    assert "the subjects **sks dog**, **zyx cat** from 6 photos" in card
    assert (run / "samples" / "01-a-zyx-cat-seed0.png").is_file()


def test_messages_name_the_entry(make_config, dog, tmp_path):
    data = two(dog, tmp_path / "none")
    with pytest.raises(UserError, match=r'^data\.subjects\[1\]\.path = ".*none": no such folder'):
        prepared(make_config(data=data), tmp_path)


def test_a_resume_notices_other_words_or_photos_of_any_subject_but_not_another_place(
    make_config, dog, cat, tmp_path
):
    run = dreambooth.run(make_config(data=two(dog, cat), train={"steps": 1, "batch_size": 1}))
    for change in ("trigger=abc", "repeats=3"):
        with pytest.raises(UserError, match=r"data.subjects = .*: this run was started with"):
            load_run(run, [f"data.subjects[1].{change}"])
    moved = cat.rename(tmp_path / "moved")
    dreambooth.run(load_run(run, [f"data.subjects[1].path={moved}"]), resume=True)
    photo(moved / "new.png", (16, 16), 20)
    with pytest.raises(UserError, match=r"^data.subjects \(.*moved.*not what it was"):
        dreambooth.run(load_run(run), resume=True)
    other = make_config(data=two(dog, moved, repeats=2), train={"steps": 1, "batch_size": 1})
    with pytest.raises(UserError, match="data.repeats = 2, was 1"):
        dreambooth.run(other, resume=True)


# ---- masks and dropout ----------------------------------------------------------------------


def test_the_loss_is_that_of_the_places_a_mask_leaves(make_config, dog, tmp_path):
    """With a background of 0, what lies outside the mask has no part in loss and gradient."""
    data = {"subject": str(dog), "buckets": True, "masks": True, "mask_background": 0.0}
    session = prepared(make_config(data=data), tmp_path)
    inputs, family = session.inputs, session.family
    masks = inputs.masks
    assert masks is not None and masks[0].shape == (1, 6, 10)
    assert torch.equal(masks[0][0, :, :4], torch.ones(6, 4)) and not masks[0][0, :, 5:].any()
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in masks[1:])

    answers = {}

    def answering(outside: float):
        def denoiser(noisy, timesteps, **kwargs):
            answer = torch.zeros_like(noisy)
            answer[..., 5:] = outside
            return (answer,)

        return denoiser

    for outside in (0.0, 9.0):
        answers[outside] = family.loss(
            answering(outside), torch.stack([inputs.latents[0]]),
            inputs.conditioning.select([0]), torch.Generator().manual_seed(0), mask=masks[0][None],
        )  # fmt: skip
    assert torch.equal(answers[0.0], answers[9.0]) and answers[0.0] > 0


def test_masks_that_are_nowhere_are_said(make_config, tmp_path):
    with pytest.raises(UserError, match=r"data.masks = true: no photo has a mask; give NAME-mask"):
        prepared(make_config(data={"masks": True, "subject": None, **_plain(tmp_path)}), tmp_path)


def _plain(tmp_path: Path) -> dict:
    photo(tmp_path / "plain" / "a.png", (16, 16), 0)
    return {"subject": str(tmp_path / "plain"), "class_name": "toy"}


def test_dropout_replaces_prompts_at_its_rate_and_leaves_class_images_alone(
    make_config, dog, tmp_path
):
    data = {"subject": str(dog), "caption_dropout": 0.25, "trigger_dropout": 0.5}
    train = {"prior": "class_images", "prior_images": 2, "batch_size": 4}
    inputs = prepared(make_config(data=data, train=train), tmp_path).inputs
    counts = {"": 0, "named": 0, "bare": 0}
    for number in range(300):
        batch = inputs.batch(number, 4)
        items = [inputs.dataset.items[i] for i in inputs.dataset.batch_of_one_size(number, 4)]
        for item, row in zip(items, batch.prompt_rows, strict=True):
            words = inputs.prompts[row]
            if item.prior:
                assert words == "a toy"
            else:
                kind = "" if not words else "named" if "sks" in words else "bare"
                assert words in ("", item.prompt, item.prompt_without_trigger)
                counts[kind] += 1
    shares = {kind: count / 600 for kind, count in counts.items()}
    assert shares == pytest.approx({"": 0.25, "named": 0.375, "bare": 0.375}, abs=0.06)
    embeds = inputs.conditioning.prompt_embeds
    assert len(embeds) == len(inputs.prompts) == len(set(inputs.prompts))


# ---- stopping and going on, and what is told ------------------------------------------------


def test_two_resumes_with_everything_on_give_the_bits_of_one_run(make_config, dog, cat, tmp_path):
    train = {"steps": 7, "batch_size": 2, "checkpoint_every": 0, "prior": "base_prediction"}

    def config(folder: str):
        return make_config(
            data=two(dog, cat, **EVERYTHING), train=train, output={"dir": str(tmp_path / folder)}
        )

    dreambooth.run(config("whole"))
    cfg, done = config("parts"), 0
    for stop_in in (2, 5):
        with counted_calls() as part:
            part.at[2 * (stop_in - done - 1) + 1] = interrupt()
            with pytest.raises(TrainingInterrupted):
                dreambooth.run(cfg, resume=done > 0)
        done = stop_in
    dreambooth.run(cfg, resume=True)
    assert_same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def test_the_report_on_photos_is_an_event_and_part_of_a_dry_run(
    make_config, dog, cat, tmp_path, capsys
):
    (cat / "Thumbs.db").write_bytes(b"x")
    photo(cat / "c.png", (60, 12), 3)
    cfg = make_config(data=two(dog, cat, buckets=True), train={"steps": 1, "batch_size": 1})
    run = dreambooth.run(cfg)
    (event,) = [e for e in read_events(run / "events.jsonl") if e["event"] == "data"]
    message = str(event["message"])
    assert message.splitlines() == [
        f'4 photos in {dog}, 1 caption, 1 mask (not used: data.masks = false): "sks dog"',
        "  2.png: 3% cut off for 20 x 12",
        "  buckets: 3 of 20 x 12, 1 of 16 x 16",
        f'3 photos in {cat}: "zyx cat"',
        "  c.png: 67% cut off for 20 x 12",
        "  buckets: 1 of 12 x 20, 1 of 16 x 16, 1 of 20 x 12",
        "1 other file skipped:",
        "  Thumbs.db: not an image",
    ]
    assert message in capsys.readouterr().out
    (tmp_path / "my.toml").write_text(to_toml(cfg))
    argv = [str(tmp_path / "my.toml"), "--output.dir", str(tmp_path / "other"), "--dry-run"]
    assert main_dreambooth(argv) == 0
    out = capsys.readouterr().out
    assert all(f"# {line}" in out for line in message.splitlines())


@pytest.mark.parametrize("named", [True, False])
def test_encoded_photos_are_kept_where_they_can_be_removed_alone(
    make_config, tmp_path, monkeypatch, named
):
    monkeypatch.setenv("NORA_LATENTS_DIR", str(tmp_path / "latents") if named else "")
    prepared(make_config(), tmp_path)
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == (3 if named else 0)
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "cache" / "latents").exists()
