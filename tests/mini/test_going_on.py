"""A run that goes on from an exported mini, and one that a time limit ends, at toy size."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from nora_diffusion.mini import denoiser, sources, start, state
from nora_diffusion.mini.__main__ import PRESETS, main
from nora_diffusion.mini.autoencoder import LATENT_CHANNELS, build_autoencoder
from nora_diffusion.mini.denoiser import Joint
from nora_diffusion.mini.export import build_pipeline, export
from nora_diffusion.mini.sources import Concept
from nora_diffusion.mini.text import WIDTH, build_text_encoder, build_tokenizer

CHUNK, BATCH = 4, 4
STEPS = CHUNK // BATCH * denoiser.PASSES  # of a chunk


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained mini at 16 px."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "manifests").mkdir()
    for stage in ("autoencoder", "denoiser"):
        (folder / "manifests" / f"{stage}.txt").write_text("seen before\n", encoding="utf-8")
    torch.manual_seed(1)
    tokenizer = build_tokenizer([Concept("d", "dog", "dog", Path())], folder / "words")
    unet = UNet2DConditionModel(
        sample_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipeline = build_pipeline(
        build_autoencoder(8), Joint(unet, build_text_encoder(tokenizer)), tokenizer
    )
    export(pipeline, folder / "mini", "toy-16", {"size_px": 16}, folder / "manifests")
    return folder / "mini"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder for toy runs of the preset "gpu" on two emoji."""
    made = []
    for name, colour in (("square", (255, 0, 0)), ("night", (0, 0, 60))):
        Image.new("RGBA", (32, 32), (*colour, 255)).save(tmp_path / f"{name}.png")
        made.append(Concept(name, name, "shape", tmp_path / f"{name}.png"))
    for module in (sources, denoiser):
        monkeypatch.setattr(module, "concepts", lambda *_: made)
    monkeypatch.setattr(denoiser, "CHUNK", CHUNK)
    toy = replace(
        PRESETS["gpu"], size_px=32, denoiser_samples=10_000, batch_size=BATCH, backgrounds=4
    )
    monkeypatch.setitem(PRESETS, "gpu", toy)
    return tmp_path / "work"


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every look at the clock finds it two seconds later."""
    ticking = count(step=2)
    for module in (state, denoiser):
        monkeypatch.setattr(module, "monotonic", lambda: float(next(ticking)))
    yield


def _run(work: Path, *arguments: str) -> Path:
    """Runs toy stages and returns the folder that export writes to."""
    out = work.with_name("out")
    main([*arguments, "--preset=gpu", f"--work={work}", f"--out={out}", "--device=cpu"])
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def test_no_step_exports_the_start_at_the_new_size(work: Path, exported: Path):
    out = _run(work, "export", f"--start={exported}")
    before, after = _weights(exported), _weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == 4
    # What loads a model notes where from: a path of the machine that trained it.
    assert not any(str(work) in path.read_text() for path in out.rglob("*.json"))
    about = json.loads((out / "mini.json").read_text())["recipe"]
    assert about["start"] == json.loads((exported / "mini.json").read_text())
    assert about["denoiser_samples"] == about["autoencoder_samples"] == 0


def test_a_time_limit_ends_the_run_annealed_and_is_recorded(
    work: Path, exported: Path, ticks: None, monkeypatch: pytest.MonkeyPatch
):
    rates = []
    brief = partial(state.learning_rate_at, warmup=1)
    monkeypatch.setattr(denoiser, "learning_rate_at", brief)
    update = state.Trained.update
    monkeypatch.setattr(
        state.Trained, "update", lambda self, rate: (rates.append(rate), update(self, rate))[1]
    )
    out = _run(work, "train", "export", f"--start={exported}", "--minutes=1")
    assert STEPS < len(rates) < 20  # of 2,500; more than one chunk
    peak = PRESETS["gpu"].learning_rate
    assert rates[-1] < 0.1 * peak < 0.8 * peak < max(rates)
    about = json.loads((out / "mini.json").read_text())["recipe"]
    assert about["denoiser_samples"] == len(rates) * BATCH
    assert about["denoiser_minutes"] == pytest.approx(1, abs=0.15)
    names = (out / "manifests" / "denoiser.txt").read_text(encoding="utf-8").splitlines()
    assert names == ["seen before", "square", "night"]
    assert (out / "manifests" / "autoencoder.txt").read_text(encoding="utf-8") == "seen before\n"


def test_a_stopped_run_continues_with_the_time_it_had_left(
    work: Path, exported: Path, ticks: None, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Exception):
        pass

    def save_and_stop(*arguments):
        state.save_state(*arguments)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(denoiser, "save_state", save_and_stop)
        with pytest.raises(Stopped):
            _run(work, "train", f"--start={exported}", "--minutes=1")
    _, stopped = state.load_state(work / "mini-128-v1" / "denoiser.safetensors")
    assert stopped["step"] == STEPS and 0 < stopped["seconds"] < 40
    _run(work, "train", "--minutes=1")  # the work folder remembers the start
    tensors, ended = state.load_state(work / "mini-128-v1" / "denoiser.safetensors")
    assert STEPS < ended["step"] < 20
    assert ended["samples"] == ended["step"] * BATCH
    assert ended["seconds"] == pytest.approx(60, abs=10)
    assert all(v == ended["step"] for k, v in tensors.items() if k.startswith("step."))
    again = _weights(_run(work, "train", "export", "--minutes=1"))  # the time is used up
    average = tensors["average.unet.conv_in.weight"].half()
    assert torch.equal(again["unet.conv_in.weight"], average)


def test_what_cannot_be_gone_on_from_is_refused(
    work: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        _run(work, "train")
    assert "name it with --start" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mini\.json is missing"):
        start.adopt(tmp_path, work)
    work.mkdir(exist_ok=True)
    (work / "denoiser.safetensors").touch()
    with pytest.raises(ValueError, match="began from nothing"):
        start.adopt(exported, work)
    (work / "denoiser.safetensors").unlink()
    assert start.adopt(exported, work) == start.Start(work / "start")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mini.json").write_text('{"hash": "another"}', encoding="utf-8")
    with pytest.raises(ValueError, match="goes on from toy-16 already"):
        start.adopt(other, work)


def test_the_learning_rate_follows_the_clock_where_that_is_further():
    early, late = (state.learning_rate_at(300, 100_000, 1.0, elapsed=e) for e in (0.1, 0.9))
    assert early > 0.9 and late < 0.1
    assert state.learning_rate_at(90_000, 100_000, 1.0, elapsed=0.1) < 0.1
    assert state.learning_rate_at(150, 100_000, 1.0, elapsed=1.0) == pytest.approx(0.02)
