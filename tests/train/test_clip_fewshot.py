"""``nora vlm`` on a folder of classes: zero-shot, LoRA and NoRA; the test pictures stay unread."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from nora_diffusion.cli import main
from nora_diffusion.data.class_folders import choose_shots
from nora_diffusion.evaluation.fewshot_table import Row, summary, table
from nora_diffusion.events import read_events
from nora_diffusion.mini.__main__ import ASSETS
from nora_diffusion.run_command import how_to_resume
from nora_diffusion.run_config import load_config, shipped_configs
from nora_diffusion.settings import ConfigError, UserError, to_toml
from nora_diffusion.train import clip_fewshot
from nora_diffusion.train.clip_base import load_clip_base
from nora_diffusion.train.clip_fewshot import augment, describe, methods, read_pools, run
from nora_diffusion.vision_language_config import VisionLanguageConfig
from tests.tiny_language import save_base

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random `CLIPModel` in a folder, with mini's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4}
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = tower | {"image_size": 16, "patch_size": 8}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(clip).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    for name, (r, g, b) in COLOURS.items():
        (folder / name).mkdir()
        for i in range(8):
            colour = (r + 3 * i - 12, g - 3 * i + 12, b + 2 * i - 8)
            Image.new("RGB", (24, 20), colour).save(folder / name / f"{i}.png")
    (folder / "red" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def config(base, images, tmp_path):
    def make(*overrides: str) -> VisionLanguageConfig:
        given = {
            "model.base": base,
            "model.device": "cpu",
            "few_shot.images": images,
            "few_shot.shots": "[1, 4]",
            "few_shot.seeds": "[0]",
            "few_shot.lora_ranks": "[2]",
            "few_shot.lora_learning_rate": 1e-2,
            "adapter.r": 16,
            "adapter.inner_r": 4,
            "train.steps": 40,
            "output.dir": tmp_path / "run",
        }
        lines = [f"{key}={value}" for key, value in given.items()]
        return load_config(VisionLanguageConfig, "clip_fewshot", [*lines, *overrides])

    return make


def test_adapters_learn_the_classes_and_the_base_comes_back(config, tmp_path, capsys):
    settings = config()
    path = run(settings)
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 2 * 2
    best = [s for s in record["summary"] if s["shots"] == 4]
    assert {s["method"] for s in best} == {"NoRA", "LoRA r 2"}
    assert all(s["accuracy_mean"] > max(0.8, record["zero_shot"]) for s in best)
    nora, lora = (next(s for s in best if s["method"] == m) for m in ("NoRA", "LoRA r 2"))
    modules = 2 * 2 * 4  # towers x layers x projections
    assert nora["trainable_parameters"] == modules * 2 * 16 * 4
    assert lora["trainable_parameters"] == modules * 2 * 32 * 2
    assert "zero-shot" in capsys.readouterr().out
    adapters = sorted((tmp_path / "run" / "adapters").glob("*/adapter_model.safetensors"))
    assert len(adapters) == 4


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(config, monkeypatch):
    settings = config("few_shot.lora_ranks=[]")
    path = run(settings)
    whole = json.loads(path.read_text())["rows"]
    cut = json.loads(path.read_text())
    cut["rows"] = cut["rows"][:1]
    path.write_text(json.dumps(cut))
    trained = []
    real = clip_fewshot.train_one
    monkeypatch.setattr(
        clip_fewshot, "train_one", lambda *a, **k: trained.append(1) or real(*a, **k)
    )
    again = json.loads(run(settings, resume=True).read_text())["rows"]
    assert len(trained) == 1
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in whole]


def test_a_stop_is_told_and_leads_back_to_the_rest(config, tmp_path, monkeypatch):
    settings = config("few_shot.lora_ranks=[]")
    real, trained = clip_fewshot.train_one, []

    def stopped_second(*args, **kwargs):
        if trained:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(clip_fewshot, "train_one", stopped_second)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    told = how_to_resume(settings, str(tmp_path / "run"))
    assert told.startswith("what is finished is kept; go on with: nora vlm --resume ")
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["event"] == "stopped"


def test_a_user_sees_no_remark_of_a_library_on_another(config, recwarn):
    run(config("train.steps=1"))
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_each_seed_has_a_start_of_its_own(config, monkeypatch):
    """Of NoRA as of LoRA; one seed always gives the same."""
    settings = config("few_shot.shots=[1]", "few_shot.seeds=[0, 1]", "train.steps=1")
    starts, real = {}, clip_fewshot.get_peft_model

    def kept(model, adapter):
        made = real(model, adapter)
        of_start = [p.detach().clone() for n, p in made.named_parameters() if p.requires_grad]
        starts.setdefault(type(adapter).__name__, []).append(of_start)
        return made

    monkeypatch.setattr(clip_fewshot, "get_peft_model", kept)
    run(settings)
    for found in starts.values():
        first, second = found
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_seed_shows_no_spread():
    rows = [Row("NoRA", 1, seed, value, 8, 4, 0.1) for seed, value in enumerate((0.2, 0.4))]
    assert summary(rows)[0]["accuracy_std"] == pytest.approx(0.1 * 2**0.5)
    assert summary(rows[:1])[0]["accuracy_std"] is None
    assert "20.0" in table(0.1, rows[:1]) and "±" not in table(0.1, rows[:1])


def test_test_pictures_are_never_trained_on(config, monkeypatch):
    """The results of training are the same whatever the test pictures are."""
    settings = config()
    base = load_clip_base(settings.model.base, torch.float32, torch.device("cpu"))
    train, test = read_pools(settings, base.prepare)
    flat = {tuple(p.flatten().tolist()) for p in train.pixels}
    assert not any(tuple(p.flatten().tolist()) in flat for p in test.pixels)
    few = choose_shots(train, 2, seed=1)
    assert torch.bincount(few.labels).tolist() == [2, 2, 2]
    assert not torch.equal(few.pixels, choose_shots(train, 2, seed=2).pixels)
    prompts = base.tokenise([f"a photo of a {c}" for c in train.classes])
    method = methods(settings, base)[0]
    other = test.take(range(len(test.labels) - 1, -1, -1))
    losses = [
        clip_fewshot.train_one(settings, base, method, few, t, prompts, 2, 0)[1]
        for t in (test, other)
    ]
    assert losses[0] == losses[1]


def test_towers_choose_the_modules(config):
    settings = config()
    base = load_clip_base(settings.model.base, torch.float32, torch.device("cpu"))
    assert len(base.targets(("vision",))) == len(base.targets(("language",))) == 8
    names = {n.rpartition(".")[2] for n in base.targets(("vision", "language"))}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}


@pytest.mark.parametrize(("towers", "times"), [("vision", 1), ("vision,language", 6)])
def test_prompts_are_embedded_again_only_where_their_tower_learns(config, towers, times):
    """In six steps; once more for the test."""
    settings = config(f"adapter.towers={towers}", "train.steps=6", "few_shot.lora_ranks=[]")
    base = load_clip_base(settings.model.base, torch.float32, torch.device("cpu"))
    train, test = read_pools(settings, base.prepare)
    prompts = base.tokenise([f"a photo of a {c}" for c in train.classes])
    calls = []
    counted = dataclasses.replace(
        base, embed_texts=lambda ids: calls.append(1) or base.embed_texts(ids)
    )
    (method,) = methods(settings, base)
    few = choose_shots(train, 1, seed=0)
    row, _ = clip_fewshot.train_one(settings, counted, method, few, test, prompts, 1, 0)
    assert row.steps == 6 and len(calls) == times + 1


def test_crops_keep_size_and_stay_inside(config):
    ramp = torch.linspace(0, 1, 16).expand(4, 3, 16, 16).contiguous()
    out = augment(ramp, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape
    assert out.min() >= 0 and out.max() <= 1
    assert not torch.equal(out[0], out[1])


def test_mistakes_are_named(config, images, tmp_path):
    with pytest.raises(ConfigError, match=r"few_shot.template.*must hold \{\}"):
        config("few_shot.template=a photo")
    with pytest.raises(ConfigError, match="adapter.inner_r = 99"):
        config("adapter.inner_r=99")
    with pytest.raises(UserError, match=r"few_shot.shots = 5.*4 pictures"):
        run(config("few_shot.shots=[5]"))
    (tmp_path / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "red" / "a.png")
    with pytest.raises(UserError, match="two or more classes"):
        run(config(f"few_shot.images={tmp_path / 'one'}"))
    with pytest.raises(UserError, match="no CLIPModel"):
        run(config(f"model.base={tmp_path}"))


def test_a_base_that_is_no_clip_is_named_with_its_type(config, tmp_path):
    """`CLIPModel` alone would take it, with random weights."""
    of_language = save_base(tmp_path / "llama")
    for check in (run, describe):
        with pytest.raises(UserError, match=r'model\.base = .*is a model of type "llama"'):
            check(config(f"model.base={of_language}"))
        with pytest.raises(UserError, match=r'model\.base = "/no/such": no such folder'):
            check(config("model.base=/no/such"))
    assert not (tmp_path / "run").exists()


def test_what_a_run_refuses_a_dry_run_refuses_before_it_loads_weights(
    config, images, tmp_path, capsys
):
    """The base is one of the hub, which cannot be had here."""
    (tmp_path / "other").mkdir()
    for name in ("red", "green", "black"):
        (tmp_path / "other" / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / name / "a.png")
    (tmp_path / "fewshot.toml").write_text(to_toml(config("model.base=openai/no-such-clip")))
    for given, told in (
        (["--few_shot.images", "/no/such"], "few_shot.images = '/no/such': no such folder"),
        (["--few_shot.images", str(tmp_path)], "few_shot.images = "),
        (["--few_shot.test", "/no/such"], "few_shot.test = '/no/such': no such folder"),
        (["--few_shot.test", str(tmp_path / "other")], "only one of the two has: black, blue"),
        (["--few_shot.shots", "5"], "few_shot.shots = 5: 'blue' has 4 pictures"),
    ):
        for more in (["--dry-run"], []):
            assert main(["vlm", str(tmp_path / "fewshot.toml"), *given, *more]) == 2
            assert told in capsys.readouterr().err
            assert not (tmp_path / "run").exists()


def test_a_broken_picture_is_told_by_its_key(config, tmp_path):
    for name in ("red", "blue"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "all" / name / f"{i}.png")
    (tmp_path / "all" / "red" / "1.png").write_text("no picture")
    with pytest.raises(
        UserError, match=r"^few_shot\.images: .*red/1\.png: cannot be read as a pic"
    ):
        run(config(f"few_shot.images={tmp_path / 'all'}", "few_shot.shots=[1]"))


def test_the_command_line(base, images, tmp_path, capsys):
    argv = ["vlm", "clip_fewshot", "--few_shot.images", str(images), "--model.base", str(base)]
    argv += ["--output.dir", str(tmp_path / "run"), "--model.device", "cpu"]
    argv += ["--few_shot.shots", "1", "--few_shot.seeds", "0", "--train.steps", "2"]
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert 'task = "few_shot"' in out
    assert "# 3 classes, 12 pictures to choose from, 12 to test on, on cpu" in out
    assert not (tmp_path / "run").exists()
    assert main(argv) == 0
    assert "NoRA" in capsys.readouterr().out
    assert main(argv) == 2
    assert "nora vlm --resume" in capsys.readouterr().err
    assert main(["vlm", "clip_fewshot"]) == 2
    assert "few_shot.images: missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_configs("nora vlm"))
def test_shipped_configs_are_short_and_valid(name):
    path = shipped_configs("nora vlm")[name]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith(f"# nora vlm {name} ")
    needed = ["few_shot.images=x", "data.train=y"]
    load_config(VisionLanguageConfig, name, needed)
