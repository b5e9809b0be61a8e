"""Pictures from an adapter: the right ones, with their origin inside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nora_diffusion import adapter_info, export_lora, load_adapter, load_pipeline, save_adapter
from nora_diffusion.config import UserError
from nora_diffusion.sampling import (
    adapter_path,
    picture_path,
    sample_to_folder,
    save_png,
)
from nora_diffusion.sheets import before_after_sheet, contact_sheet
from tests.disk import read_only
from tests.tiny import adapt, tiny_pipeline

FAST = {"n": 2, "steps": 2, "guidance": 3.0, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an adapter that changes the pictures a lot."""
    folder = tmp_path_factory.mktemp("sampling")
    pipe = tiny_pipeline("sd15")
    pipe.save_pretrained(folder / "base")
    adapt(pipe, text_encoders=True, scaling=4.0)
    about = {"base": str(folder / "base"), "trigger": "zyx", "class_name": "toy"}
    save_adapter(pipe, folder / "run" / "adapter.safetensors", metadata=about)
    return folder / "run"


def test_files_are_the_pipelines_own_pictures_and_say_how_they_were_made(run, tmp_path):
    prompts = ["a {trigger} {class_name} at Zürich/beach", "b"]
    files = sample_to_folder(run, prompts, tmp_path, seed=5, negative_prompt="ugly", **FAST)
    assert [file.name for file in files] == [
        "00-a-zyx-toy-at-zürich-beach-seed5.png",
        "00-a-zyx-toy-at-zürich-beach-seed6.png",
        "01-b-seed5.png",
        "01-b-seed6.png",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    pipe = load_pipeline(run.parent / "base")
    pipe.set_progress_bar_config(disable=True)
    load_adapter(pipe, run / "adapter.safetensors")
    with Image.open(files[1]) as image:
        expected = {
            "prompt": "a zyx toy at Zürich/beach",
            "negative_prompt": "ugly",
            "seed": "6",
            "steps": "2",
            "guidance": "3.0",
            "adapter": "run/adapter.safetensors",
            "adapter_checksum": adapter_info(run)["checksum"],
            "adapter_weight": "1.0",
            "base": "base",
            "Comment": "AI-generated",
        }
        assert expected.items() <= image.text.items()
        assert image.text["Software"].startswith("nora-diffusion ")
        assert str(run.parent) not in str(image.text)  # nothing of the user's folders
        drawn = np.asarray(image.convert("RGB")).astype(int)
    plain = pipe(
        image.text["prompt"], negative_prompt="ugly", num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(6),
    ).images[0]  # fmt: skip
    assert np.abs(drawn - np.asarray(plain).astype(int)).max() <= 1


def pixels(files):
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


def test_weight_zero_is_the_base_and_other_weights_lie_beyond(run, tmp_path):
    drawn = {
        weight: pixels(sample_to_folder(run, ["x"], tmp_path / str(weight), weight=weight, **FAST))
        for weight in (0.0, 0.5, 1.0)
    }
    pipe = load_pipeline(run.parent / "base")
    pipe.set_progress_bar_config(disable=True)
    base = pipe(
        "x", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.abs(drawn[0.0][0] - np.asarray(base).astype(int)).max() <= 1
    distance = {weight: np.abs(drawn[weight][0] - drawn[0.0][0]).mean() for weight in (0.5, 1.0)}
    assert 0 < distance[0.5] < distance[1.0]


def test_the_same_seed_gives_the_same_picture_in_any_company(run, tmp_path):
    many = pixels(sample_to_folder(run, ["a", "b"], tmp_path / "many", **{**FAST, "n": 3}))
    one = pixels(sample_to_folder(run, ["b"], tmp_path / "one", seed=2, **{**FAST, "n": 1}))
    assert np.abs(many[5] - one[0]).max() <= 1
    assert np.abs(many[4] - one[0]).max() > 1


def test_size_can_be_chosen(run, tmp_path):
    file = sample_to_folder(run, ["a"], tmp_path, width=32, height=16, **{**FAST, "n": 1})[0]
    with Image.open(file) as image:
        assert image.size == (32, 16)


def test_what_is_no_run_is_refused_with_the_reason(tmp_path, run):
    with pytest.raises(UserError, match="this folder has none of adapter.safetensors"):
        adapter_path(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="not finished.*nora-dreambooth --resume"):
        adapter_path(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    before_its_first_checkpoint = tmp_path / "a run"
    before_its_first_checkpoint.mkdir()
    config = before_its_first_checkpoint / "config.toml"
    config.write_text("# Continue this run with: nora vlm --resume DIR\n")
    with pytest.raises(UserError, match=r"not finished.*nora vlm --resume '.*a run'$"):
        adapter_path(before_its_first_checkpoint)
    pipe = tiny_pipeline("sd15")
    adapt(pipe)
    save_adapter(pipe, tmp_path / "anonymous.safetensors")
    with pytest.raises(UserError, match="does not name its base model.*--base"):
        sample_to_folder(tmp_path / "anonymous.safetensors", ["a"], tmp_path / "out", **FAST)
    named = {**FAST, "base": str(run.parent / "base"), "n": 1}
    assert sample_to_folder(tmp_path / "anonymous.safetensors", ["a"], tmp_path / "out", **named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 60}, r"width = 60 \(--width\).*multiple of 8, such as"),
        ({"height": 3}, r"height = 3 \(--height\).*such as 8"),
        ({"steps": 1001}, r"steps = 1001 \(--steps\).*give 1 to 1000"),
        ({"seed": 10**22}, r"seed = 1000.*\(--seed\)"),
        ({"seed": 2**64 - 1, "n": 2}, r"seed = .*\(--seed\)"),
        ({"weight": float("nan")}, r"weight = nan \(--weight\)"),
        ({"guidance": float("inf")}, r"guidance = inf \(--guidance\)"),
        ({"weight": 1e30}, "NaN or infinity.*--weight"),
        ({"negative_prompt": "bad \udcff byte"}, "prompt .* character 5 is no valid text"),
    ],
)
def test_numbers_and_texts_that_cannot_be_drawn_are_refused(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sample_to_folder(run, ["a"], tmp_path / "out", **{**FAST, "n": 1, **options})
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_there_are_kept(run, tmp_path):
    names = []
    for weight in (0.0, 1.0, 0.5):
        names += sample_to_folder(run, ["a"], tmp_path, weight=weight, **{**FAST, "n": 1})
    assert [name.name for name in names] == [
        "00-a-seed0.png",
        "00-a-seed0-2.png",
        "00-a-seed0-3.png",
    ]
    assert (pixels(names[:1])[0] != pixels(names[1:2])[0]).any()


def test_a_place_that_cannot_be_written_is_told_before_the_base_is_loaded(
    run, tmp_path, monkeypatch
):
    (tmp_path / "afile").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("nora_diffusion.sampling.load_family", None)
    for out, reason in (("afile", "is a file"), ("afile/x/y", "afile is a file")):
        with pytest.raises(UserError, match=f"--out .*{out}: .*{reason}; give another place"):
            sample_to_folder(run, ["a"], tmp_path / out, **FAST)
    with read_only(tmp_path / "locked"), pytest.raises(UserError, match=r"--out .*\(Permission"):
        sample_to_folder(run, ["a"], tmp_path / "locked" / "new", **FAST)


def test_out_may_start_with_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (file,) = sample_to_folder(run, ["a"], "~/pics", **{**FAST, "n": 1})
    assert file.parent == tmp_path / "home" / "pics" and not Path("~").exists()


def test_names_of_pictures_fit_every_file_system(tmp_path):
    for letter in "a", "ü", "狗", "𝒶":
        path = picture_path(tmp_path, 0, 80 * letter, 2**64 - 1)
        save_png(solid("red"), path, {})
        assert path.is_file() and letter in path.name
    assert picture_path(tmp_path, 3, "A " * 60, 1).name == f"03-{'a-' * 30}-seed1.png"


def test_folders_of_exports_are_found(run, tmp_path):
    base = load_pipeline(run.parent / "base")
    export_lora(run, tmp_path / "lora" / "pytorch_lora_weights.safetensors", base=base)
    assert adapter_path(tmp_path / "lora").name == "pytorch_lora_weights.safetensors"
    assert adapter_info(adapter_path(tmp_path / "lora"))["kind"] == "lora"
    pipe = tiny_pipeline("sd15")
    adapt(pipe, text_encoders=False)
    native = save_adapter(pipe, tmp_path / "a.safetensors")
    export_lora(native, tmp_path / "peft", "peft", base=pipe)
    assert adapter_path(tmp_path / "peft").name == "adapter_model.safetensors"
    export_lora(run, tmp_path / "parts", "peft", base=base)  # with a text encoder
    assert adapter_path(tmp_path / "parts") == tmp_path / "parts"
    for source in (run, tmp_path / "parts"):
        out = tmp_path / f"of {source.name}"
        sample_to_folder(source, ["a"], out, weight=1.0, **{**FAST, "n": 1})
    of_run, of_parts = (pixels(sorted((tmp_path / f"of {n}").glob("*"))) for n in ("run", "parts"))
    assert abs(of_run[0].astype(int) - of_parts[0].astype(int)).max() <= 2
    assert adapter_path(run) == run / "adapter.safetensors"


def solid(colour, size=(16, 16)):
    return Image.new("RGB", size, colour)


def test_a_sheet_holds_every_picture_in_its_place():
    colours = [["red", "lime"], ["blue", "black"]]
    rows = [[solid(colour) for colour in row] for row in colours]
    sheet = contact_sheet(rows, ["first", "second"], ["a", "b"], title="t", tile_px=32)
    pixels = np.asarray(sheet)
    centres = {}
    for colour, value in {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}.items():
        ys, xs = np.nonzero((pixels == value).all(axis=2))
        assert len(ys) == 32 * 32
        centres[colour] = (ys.mean(), xs.mean())
    assert centres["red"][0] == centres["lime"][0] < centres["blue"][0]
    assert centres["red"][1] == centres["blue"][1] < centres["lime"][1]
    labelled = (pixels[:, : int(centres["red"][1]) - 20] != 255).any()
    assert labelled
    bare = contact_sheet(rows, tile_px=32)
    assert bare.width < sheet.width and bare.height < sheet.height


def test_a_sheet_takes_gaps_other_shapes_and_long_or_foreign_labels():
    rows = [[solid("red", (40, 10)), None], [solid("blue")]]
    label = "a very long prompt that has to be wrapped " * 20 + "狗"
    sheet = contact_sheet(rows, [label], tile_px=64)
    ys, xs = np.nonzero((np.asarray(sheet) == (255, 0, 0)).all(axis=2))
    assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == (64, 16)
    assert contact_sheet([]).size[0] > 0


def test_a_long_label_of_a_column_stays_above_it():
    rows = [[solid("red"), solid("lime")]]
    sheet = contact_sheet(rows, column_labels=["in the night sky above mountains", ""], tile_px=64)
    pixels = np.asarray(sheet)
    ys, xs = np.nonzero((pixels == (0, 255, 0)).all(axis=2))
    above = pixels[: ys.min()]
    assert (above[:, : xs.min()] < 128).any() and not (above[:, xs.min() :] < 128).any()


def test_before_and_after_stand_beside_each_other():
    sheet = before_after_sheet(
        [solid("yellow")] * 5,
        ["one", "two"],
        before=[[solid("red"), solid("red")]] * 2,
        after=[[solid("lime"), solid("lime")]] * 2,
    )
    pixels = np.asarray(sheet)

    def columns(colour):
        return np.nonzero((pixels == colour).all(axis=2))[1]

    assert columns((255, 0, 0)).max() < columns((0, 255, 0)).min()
    assert len(columns((255, 0, 0))) == len(columns((0, 255, 0))) == 4 * 128 * 128
    yellow = columns((255, 255, 0))  # five squares of one size in the width of the rest
    assert yellow.max() < sheet.width and (len(yellow) / 5) ** 0.5 % 1 == 0


def test_a_picture_is_whole_or_absent(tmp_path):
    path = tmp_path / "sub" / "a.png"
    save_png(solid("red"), path, {"prompt": "p"})
    with pytest.raises(AttributeError):
        save_png(None, path, {})  # type: ignore[arg-type]
    with pytest.raises(UnicodeEncodeError):
        save_png(solid("red"), path, {"prompt": "\udcff"})
    with Image.open(path) as image:
        assert image.text["prompt"] == "p"
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_runs_own_settings_are_taken_where_none_are_given(run, tmp_path):
    config = run / "config.toml"
    config.write_text("[sample]\nsteps = 3\nguidance = 1.5\n", encoding="utf-8")
    try:
        (file,) = sample_to_folder(run, ["a"], tmp_path, n=1, device="cpu")
    finally:
        config.unlink()
    with Image.open(file) as image:
        assert (image.text["steps"], image.text["guidance"]) == ("3", "1.5")
