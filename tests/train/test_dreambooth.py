"""The recipe: what it trains and what it leaves alone, how it stops and goes on, what it writes."""

import dataclasses
import math
import os
import re
import runpy
import signal
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nora_diffusion import adapter_info, load_adapter, load_pipeline
from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.adapter.switch import switched_off
from nora_diffusion.config import UserError, load_config, load_run
from nora_diffusion.events import read_events
from nora_diffusion.train import adapters, common, dreambooth
from nora_diffusion.train.checkpoint import newest_checkpoint
from nora_diffusion.train.common import START_BATCHES, TrainingDiverged, TrainingInterrupted
from nora_diffusion.train.prepare import prepare
from nora_diffusion.train.report import Report
from tests.tiny import base_bytes, predict
from tests.train.conftest import counted_calls

ROOT = Path(__file__).parents[2]


def prepared(cfg, tmp_path) -> dreambooth.Session:
    report = Report(tmp_path, total_steps=cfg.train.steps, log_every=1)
    return prepare(cfg, tmp_path, report)


def trained(run: Path) -> dict[str, torch.Tensor]:
    """The adapter's inner pairs."""
    tensors = load_file(run / "adapter.safetensors")
    assert tensors
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing


# ---- what is trained ------------------------------------------------------------------------


def test_a_fitted_start_reaches_the_text_encoder_and_costs_no_storage(
    make_config, tmp_path, capsys
):
    files = {}
    for init in ("orthogonal", "gradient"):
        cfg = make_config(
            adapter={"init": init}, text_encoder={"train": True}, train={"steps": 1},
            output={"dir": str(tmp_path / init)},
        )  # fmt: skip
        files[init] = dreambooth.run(cfg) / "adapter.safetensors"
        said = "fitting the start of the inner pairs to the photos" in capsys.readouterr().out
        assert said == (init == "gradient")
    seeded, fitted = (trained(tmp_path / init) for init in ("orthogonal", "gradient"))
    assert seeded.keys() == fitted.keys()
    assert any(name.startswith("text_encoder") for name in fitted)
    moved = [name for name in fitted if not torch.allclose(seeded[name], fitted[name], atol=0.05)]
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    sizes = [path.stat().st_size for path in files.values()]
    assert abs(sizes[0] - sizes[1]) < 500  # what the header says of the run


def test_training_lowers_the_loss_on_a_fixed_batch(make_config, tmp_path):
    cfg = make_config(train={"steps": 40, "learning_rate": 2e-2, "batch_size": 3})
    session = prepared(cfg, tmp_path)
    family, inputs = session.family, session.inputs

    @torch.no_grad()
    def fixed_loss() -> float:
        rows = inputs.conditioning.select([0] * 3).repeat(8)
        latents = inputs.latents[:3].repeat_interleave(8, dim=0)
        generator = torch.Generator().manual_seed(1)
        losses = family.loss(family.components.denoiser, latents, rows, generator)
        return losses.mean().item()

    before = fixed_loss()
    dreambooth.train(session)
    assert fixed_loss() < 0.97 * before


@pytest.mark.parametrize("text", [False, True])
def test_only_the_inner_pairs_get_gradient_and_the_base_keeps_its_bytes(
    make_config, tmp_path, text
):
    cfg = make_config(text_encoder={"train": text})
    session = prepared(cfg, tmp_path)
    before = {name: base_bytes(model) for name, model in session.models.items()}
    assert session.models.keys() == ({"unet", "text_encoder"} if text else {"unet"})
    dreambooth.accumulate_gradients(session, 0)
    inner = {id(p) for p in session.parameters.values()}
    for model in session.models.values():
        touched = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
        assert touched and all(id(p) in inner for p in touched)
        assert all(p.requires_grad == (id(p) in inner) for p in model.parameters())
    dreambooth.train(session)
    assert {name: base_bytes(model) for name, model in session.models.items()} == before


def test_targets_are_attention_unless_more_is_asked_for(make_config, tmp_path):
    def adapted(**adapter) -> set[str]:
        session = prepared(make_config(adapter={"r": 4, "inner_r": 2, **adapter}), tmp_path)
        return {name for name, _ in iter_nora_layers(session.models["unet"])}

    attention = adapted()
    assert attention and all(re.search(r"attn\d\.to_(q|k|v|out\.0)$", name) for name in attention)
    everything = adapted(targets=["attention", "feed_forward", "convolution"])
    extra = everything - attention
    assert attention < everything
    assert {name for name in extra if ".ff." in name}
    assert {"conv_in", "conv_out"} <= extra
    assert any(name.endswith("resnets.0.conv1") for name in extra)
    assert adapted(target_modules=["to_q"]) == {n for n in attention if n.endswith("to_q")}
    with pytest.raises(UserError, match="adapter.target_modules.*no_such"):
        adapted(target_modules=["no_such"])


def test_a_module_narrower_than_r_is_told_of_and_no_warning(make_config, tmp_path, capsys, recwarn):
    adapter = {"r": 8, "inner_r": 2, "targets": ["attention", "convolution"]}
    prepared(make_config(adapter=adapter), tmp_path)
    narrow = r"modules \(\d+ of them narrower than r, e\.g\. conv_\w+\), [\d,]+ trained"
    assert re.search(narrow, capsys.readouterr().out)
    prepared(make_config(adapter={"r": 4, "inner_r": 2}), tmp_path)
    assert "narrower" not in capsys.readouterr().out
    assert not [w for w in recwarn if "ranks are lowered" in str(w.message)]


def test_text_encoder_has_its_own_rank_and_learning_rate(make_config, tmp_path):
    cfg = make_config(
        text_encoder={"train": True, "r": 6, "inner_r": 3, "learning_rate": 1e-4},
        train={"steps": 4, "batch_size": 2, "learning_rate": 5e-3, "loraplus_lr_ratio": 3},
    )
    session = prepared(cfg, tmp_path)
    shapes = {
        component: {layer.nora_inner_A["default"].shape for _, layer in iter_nora_layers(model)}
        for component, model in session.models.items()
    }
    assert shapes == {"unet": {(2, 8)}, "text_encoder": {(3, 6)}}
    assert rates_of(session) == {
        ("unet", "B"): 5e-3,
        ("unet", "A"): 5e-3 / 3,
        ("text_encoder", "B"): 1e-4,
        ("text_encoder", "A"): 1e-4 / 3,
    }


def rates_of(session) -> dict[tuple[str, str], float]:
    """Peak learning rate by component and side of the inner pair."""
    names = {id(p): name for name, p in session.parameters.items()}
    found = {}
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            key = name.split(".")[0], re.search(r"inner_([AB])", name)[1]
            assert found.setdefault(key, group["peak_lr"]) == group["peak_lr"]
    assert not names
    return found


@pytest.mark.parametrize(
    ("train", "rates"),
    [
        ({}, {"B": 5e-3, "A": 5e-3}),
        ({"loraplus_lr_ratio": 10}, {"B": 5e-3, "A": 5e-4}),
        ({"optimizer": "prodigy", "learning_rate": 1, "loraplus_lr_ratio": 3}, {"B": 1, "A": 1}),
    ],
)
def test_q_may_learn_at_a_share_of_the_rate_of_p(make_config, tmp_path, train, rates):
    if train.get("optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    cfg = make_config(train={"steps": 2, "learning_rate": 5e-3, "lr_warmup_steps": 0, **train})
    session = prepared(cfg, tmp_path)
    assert rates_of(session) == {("unet", side): rate for side, rate in rates.items()}
    # What is reported is the rate of the config.
    assert common.set_lr(session.optimizer, 0.5) == pytest.approx(
        0.5 * rates["B"] * session.optimizer.param_groups[0].get("d", 1.0)
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_inner_pair_in_float32(make_config, tmp_path, dtype):
    cfg = make_config(model={"dtype": dtype}, train={"steps": 3, "batch_size": 2})
    session = prepared(cfg, tmp_path)
    start = {name: p.detach().clone() for name, p in session.parameters.items()}
    dreambooth.train(session)
    assert session.family.components.denoiser.get_parameter("conv_in.weight").itemsize == 2
    assert {p.dtype for p in session.parameters.values()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in session.parameters.values())
    assert any(not torch.equal(p, start[name]) for name, p in session.parameters.items())


def test_gradient_checkpointing_changes_memory_and_not_the_result(make_config, tmp_path):
    grads = []
    for on in (False, True):
        cfg = make_config(
            train={"gradient_checkpointing": on, "batch_size": 2}, text_encoder={"train": True}
        )
        session = prepared(cfg, tmp_path)
        for model in session.models.values():
            model.train()
        dreambooth.accumulate_gradients(session, 0)
        grads.append({name: p.grad for name, p in session.parameters.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_a_fitted_start_recomputes_the_text_encoder_as_steps_do(make_config, tmp_path):
    counts = []
    for on in (False, True):
        cfg = make_config(
            adapter={"init": "gradient"}, text_encoder={"train": True},
            train={"gradient_checkpointing": on},
        )  # fmt: skip
        session = prepared(cfg, tmp_path)
        calls, encoder = [], session.models["text_encoder"]
        hook = next(m for n, m in encoder.named_modules() if n.endswith("layer_norm1"))
        hook.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        adapters.fit_inner_pairs(cfg, session.family, session.inputs, session.models, range(2))
        counts.append(len(calls))
        assert not encoder.training
    assert counts[1] == 2 * counts[0] > 0


def test_a_prompt_of_several_rows_is_encoded_once(make_config, tmp_path):
    cfg = make_config(
        text_encoder={"train": True}, train={"batch_size": 4, "prior": "base_prediction"}
    )
    session, seen = prepared(cfg, tmp_path), []
    encoder = session.models["text_encoder"]
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])),
        with_kwargs=True,
    )
    dreambooth.accumulate_gradients(session, 0)
    assert seen == [1, 1]  # of the subject, of the class


def test_accumulation_is_the_mean_over_its_parts(make_config, tmp_path):
    """Two passes of two items add up to the mean of the gradients each has alone."""
    cfg = make_config(train={"batch_size": 2, "gradient_accumulation_steps": 2})
    session = prepared(cfg, tmp_path)
    parts = []
    for micro_step in (0, 1):
        session.optimizer.zero_grad()
        dreambooth.accumulate_gradients(session, micro_step)
        parts.append({name: p.grad.clone() for name, p in session.parameters.items()})
    session.optimizer.zero_grad()
    for micro_step in (0, 1):
        dreambooth.accumulate_gradients(session, micro_step)
    for name, parameter in session.parameters.items():
        torch.testing.assert_close(parameter.grad, parts[0][name] + parts[1][name])
    assert any((parts[0][name] - parts[1][name]).abs().max() > 0 for name in parts[0])


def test_an_epoch_shows_every_photo_once(make_config, tmp_path):
    cfg = make_config(train={"batch_size": 1, "gradient_accumulation_steps": 3})
    session = prepared(cfg, tmp_path)
    for item in range(3):
        weights = torch.zeros(3)
        weights[item] = 1.0  # only this photo has a loss
        session.inputs = dataclasses.replace(session.inputs, weights=weights)
        for session.step in range(3):
            losses = [dreambooth.accumulate_gradients(session, micro) for micro in range(3)]
            assert sum(loss > 0 for loss in losses) == 1


@pytest.mark.parametrize("basis", ["activation", "gradient"])
def test_a_data_driven_basis_is_fitted_and_saved_with_the_adapter(make_config, basis):
    cfg = make_config(adapter={"basis": basis, "r": 4, "inner_r": 2})
    run = dreambooth.run(cfg)
    assert any("outer" in name for name in trained(run))
    pipe = load_pipeline(cfg.model.base)
    before = predict(pipe)
    load_adapter(pipe, run / "adapter.safetensors")
    assert (predict(pipe) - before).abs().max() > 1e-6


# ---- priors ---------------------------------------------------------------------------------


def test_base_prediction_starts_at_zero_and_pulls_back(make_config, tmp_path):
    cfg = make_config(train={"prior": "base_prediction", "batch_size": 2})
    session = prepared(cfg, tmp_path)
    batch = session.inputs.batch(0, 2)

    def prior_losses() -> torch.Tensor:
        return dreambooth._base_prediction_losses(session, batch, torch.Generator().manual_seed(0))

    assert prior_losses().abs().max() == 0
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(0.1)
    losses = prior_losses()
    assert (losses > 0).all()
    # The prior alone leads back to the base.
    optimizer = torch.optim.SGD(session.parameters.values(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        prior_losses().mean().backward()
        optimizer.step()
    assert (prior_losses() < losses).all()


def test_base_prediction_needs_no_class_images_and_one_more_pass(make_config, tmp_path, calls):
    dreambooth.run(make_config(train={"steps": 3, "prior": "base_prediction", "batch_size": 2}))
    assert calls.count == 2 * 3  # those with gradient: subject and prior
    assert not (tmp_path / "cache" / "class-images").exists()


def test_missing_class_images_are_made_once_and_weigh_what_was_asked(make_config, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "mine.png")
    cfg = make_config(
        data={"class_images": str(folder)},
        train={"steps": 1, "prior": "class_images", "prior_images": 3, "prior_weight": 0.25},
    )
    session = prepared(cfg, tmp_path / "a")
    made = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(made) == 3
    items = session.inputs.dataset.items
    prior = [item for item in items if item.weight == 0.25]
    assert len(prior) == 3 and {item.prompt for item in prior} == {"a toy"}
    assert {item.prompt for item in items} == {"a sks toy", "a toy"}
    batch = session.inputs.dataset.batch(0, 6)
    assert sum(items[index].weight == 0.25 for index in batch) == 3
    prepared(cfg, tmp_path / "b")
    assert {path: path.read_bytes() for path in folder.iterdir()} == made


def test_class_images_are_kept_in_the_cache_where_no_folder_is_named(make_config, tmp_path):
    train = {"steps": 1, "prior": "class_images", "prior_images": 2, "batch_size": 2}
    dreambooth.run(make_config(train=train))
    assert len(list((tmp_path / "cache" / "class-images").rglob("*.png"))) == 2


# ---- stopping and going on ------------------------------------------------------------------


def interrupt(number: int = signal.SIGINT):
    return lambda _: os.kill(os.getpid(), number)


VARIANTS = {
    "plain": {},
    "everything": {
        "train": {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "ema_decay": 0.9,
            "lr_schedule": "cosine",
            "prior": "base_prediction",
            "min_snr_gamma": 5.0,
            "weight_decay": 0.1,
        },
        "adapter": {"dropout": 0.2, "init": "sigma", "timestep_rank": 1.0},
        "text_encoder": {"train": True},
        "data": {"flip": True, "crop": "random"},
    },
    "fp16": {"model": {"dtype": "fp16"}},
    "fitted": {"adapter": {"basis": "activation", "r": 4, "inner_r": 2}},
    "adafactor": {"train": {"optimizer": "adafactor", "weight_decay": 0.1}},
    "prodigy": {
        "train": {"optimizer": "prodigy", "learning_rate": 1.0, "weight_decay": 0.1},
        "text_encoder": {"train": True},
    },
    "schedule_free": {
        "train": {"optimizer": "schedule_free", "learning_rate": 0.02},
        "adapter": {"init": "gradient"},
        "sample": {"prompts": ["a {trigger}"], "n": 1, "steps": 1, "every": 2},
    },
    "adamw_8bit": {  # with inner matrices large enough for an 8-bit state
        "model": {"base": "mini"},
        "train": {"optimizer": "adamw_8bit"},
        "adapter": {"target_modules": ("ff.net.0.proj",), "r": 128, "inner_r": 64},
    },
    "class images": {"train": {"prior": "class_images", "prior_images": 2, "batch_size": 2}},
}


# One with everything on and one with nothing; the rest take their time with the long tests.
OPTIMIZERS = ("adafactor", "prodigy", "schedule_free", "adamw_8bit")
EVERY_TIME = ("plain", "everything", "schedule_free")  # and all in test_optimizers.py


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in EVERY_TIME else pytest.mark.slow) for n in VARIANTS],
)
def test_two_resumes_give_the_bits_of_one_run_and_repeat_no_step(make_config, tmp_path, name):
    steps = 7

    def config(folder: str):
        sections = VARIANTS[name]
        return make_config(
            **{
                **sections,
                "train": {"steps": steps, "checkpoint_every": 0, **sections.get("train", {})},
                "output": {"dir": str(tmp_path / folder)},
            }
        )

    with counted_calls() as whole:
        dreambooth.run(config("whole"))
    a_step = 4 if name == "everything" else 1  # two passes, each for the subject and the prior
    # Fitted once: a run that is resumed has it from its checkpoint.
    fit = START_BATCHES if VARIANTS[name].get("adapter", {}).get("init") == "gradient" else 0
    assert whole.count == fit + steps * a_step

    cfg, done = config("parts"), 0
    for stop_in in (2, 5):
        with counted_calls() as part:
            before = 0 if done else fit
            part.at[before + (stop_in - done - 1) * a_step + 1] = interrupt()
            with pytest.raises(TrainingInterrupted, match="--resume"):
                dreambooth.run(cfg, resume=done > 0)
            assert part.count == before + (stop_in - done) * a_step
        done = stop_in
        assert not (tmp_path / "parts" / "adapter.safetensors").exists()
    with counted_calls() as rest:
        dreambooth.run(cfg, resume=True)
    assert rest.count == (steps - done) * a_step
    assert_same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))
    saved = [newest_checkpoint(tmp_path / folder) for folder in ("parts", "whole")]
    assert saved[0] and saved[1] and saved[0].tensors.keys() == saved[1].tensors.keys()
    for kind, tensors in saved[1].tensors.items():
        assert_same(saved[0].tensors[kind], tensors)
    if name in OPTIMIZERS:
        assert saved[0].state["optimizer"] == saved[1].state["optimizer"]
    if name == "adamw_8bit":
        assert torch.uint8 in {t.dtype for t in saved[1].tensors["optimizer"].values()}


def test_the_scale_of_the_loss_is_part_of_a_checkpoint(make_config, tmp_path):
    cfg = make_config(model={"dtype": "fp16"}, train={"steps": 2, "batch_size": 1})
    session = prepared(cfg, tmp_path)
    session.scaler.load_state_dict({**session.scaler.state_dict(), "scale": 128.0})
    dreambooth.train(session)
    saved = newest_checkpoint(tmp_path)
    resumed = prepare(cfg, tmp_path, session.report, saved)
    assert resumed.scaler.state_dict() == session.scaler.state_dict()
    assert resumed.scaler.state_dict()["scale"] == 128.0
    assert resumed.step == 2


def test_sigterm_saves_too_and_says_how_to_go_on(make_config, tmp_path, calls):
    cfg = make_config()
    calls.at[2] = interrupt(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 2.*--resume"):
        dreambooth.run(cfg)
    last = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert (last["event"], last["step"]) == ("stopped", 2)
    assert "--resume" in str(last["message"])
    names = [p.name for p in (tmp_path / "run" / "checkpoints").rglob("*")]
    assert "step-2" in names and "adapter.safetensors" not in names


def test_a_finished_run_resumed_trains_nothing_and_can_be_prolonged(make_config, tmp_path, calls):
    cfg = make_config()
    dreambooth.run(cfg)
    before, count = trained(tmp_path / "run"), calls.count
    dreambooth.run(load_run(tmp_path / "run"), resume=True)
    assert calls.count == count
    assert_same(trained(tmp_path / "run"), before)
    longer = load_run(tmp_path / "run", ["train.steps=6"])
    dreambooth.run(longer, resume=True)
    assert calls.count == count + 2
    six = make_config(
        train={**cfg.train.model_dump(), "steps": 6}, output={"dir": str(tmp_path / "six")}
    )
    dreambooth.run(six)
    assert_same(trained(tmp_path / "six"), trained(tmp_path / "run"))


def test_steps_cannot_be_taken_back(make_config, tmp_path):
    run = dreambooth.run(make_config())
    before = (run / "config.toml").read_bytes()
    with pytest.raises(UserError, match=r"train\.steps = 1: this run is at step 4 already"):
        dreambooth.run(load_run(run, ["train.steps=1"]), resume=True)
    assert (run / "config.toml").read_bytes() == before


def test_resuming_nothing_starts_from_zero(make_config, tmp_path, calls):
    dreambooth.run(make_config(), resume=True)
    assert calls.count == 4 and (tmp_path / "run" / "adapter.safetensors").is_file()


def test_checkpoints_are_pruned_to_the_newest(make_config, tmp_path):
    train = {"steps": 5, "checkpoint_every": 1, "checkpoints_keep": 3, "batch_size": 1}
    dreambooth.run(make_config(train=train))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-3", "step-4", "step-5"]


def test_a_used_folder_is_refused(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="output.dir.*holds other files and no run"):
        dreambooth.run(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_resume_with_other_settings_photos_or_base_is_refused(
    make_config, tmp_path, subject, base
):
    own = tmp_path / "photos"
    own.mkdir()
    for path in subject.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    cfg = make_config(data={"subject": str(own)})
    dreambooth.run(cfg)
    other = make_config(data={"subject": str(own)}, adapter={"r": 8, "inner_r": 1})
    with pytest.raises(UserError, match="adapter.inner_r = 1, was 2"):
        dreambooth.run(other, resume=True)
    Image.new("RGB", (16, 16), "blue").save(own / "new.png")
    with pytest.raises(UserError, match="data.subject.*not what it was"):
        dreambooth.run(cfg, resume=True)


@pytest.mark.parametrize("what", ["weight", "explosion"])
def test_divergence_stops_with_the_last_good_checkpoint_named(make_config, tmp_path, calls, what):
    def poison(unet) -> None:
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "nora_inner_B" in name:
                    parameter.fill_(math.nan if what == "weight" else 1e4)

    train = {"steps": 40, "checkpoint_every": 2, "batch_size": 1, "learning_rate": 1e-6}
    cfg = make_config(train=train)
    at = 4 if what == "weight" else 12
    calls.at[at - 1] = poison  # a pass has its cores before it begins: it is the next that sees it
    with pytest.raises(TrainingDiverged, match=r"checkpoints/step-\d+.*train.learning_rate"):
        dreambooth.run(cfg)
    assert calls.count <= at + 10
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    last = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert last["event"] == "error" and "checkpoints/step-" in str(last["message"])
    if what == "weight":
        assert "step-2" in str(last["message"]) and calls.count == at


# ---- what is written ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, subject) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    text = f"""
[model]
base = "{base}"
device = "cpu"
[adapter]
r = 8
inner_r = 2
[data]
subject = "{subject}"
class_name = "toy"
trigger = "zyx"
cache = false
[train]
steps = 4
batch_size = 2
learning_rate = 0.02
checkpoint_every = 2
log_every = 2
[sample]
every = 2
steps = 2
n = 2
prompts = ["a {{trigger}} {{class_name}}", "a {{class_name}} in the snow"]
[output]
dir = "{folder / "run"}"
tensorboard = true
"""
    (folder / "config.toml").write_text(text)
    return dreambooth.run(load_config(folder / "config.toml"))


def test_the_run_folder_holds_everything(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    assert {
        "config.toml",
        "events.jsonl",
        "adapter.safetensors",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "before_after.png",
        "samples/sheet.png",
        "samples/step-2.png",
        "samples/00-a-zyx-toy-seed0.png",
        "samples/01-a-toy-in-the-snow-seed1.png",
        "checkpoints/step-4/state.json",
    } <= names
    assert not [name for name in names if "partial" in name]
    assert any(name.startswith("tensorboard/events.") for name in names)
    resolved = tomllib.loads((finished / "config.toml").read_text())
    assert resolved["adapter"]["inner_r"] == 2 and resolved["train"]["weight_decay"] == 0.0
    assert load_run(finished).data.trigger == "zyx"


def test_events_tell_the_whole_run(finished):
    events = read_events(finished / "events.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["data", "start"] and kinds[-1] == "done"
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [2, 4]
    assert all(event["loss"] and event["lr"] and event["eta_s"] is not None for event in steps)
    assert steps[-1]["eta_s"] == 0
    pictures = [event["image"] for event in events if event["event"] == "sample"]
    assert pictures == ["samples/step-2.png", "samples/sheet.png", "before_after.png"]
    assert all((finished / str(picture)).is_file() for picture in pictures)
    assert kinds.count("checkpoint") == 2


def test_the_adapter_says_where_it_comes_from(finished, base):
    info = adapter_info(finished / "adapter.safetensors")
    assert info["base"] == str(base)
    assert (info["family"], info["trigger"], info["class_name"]) == ("sd", "zyx", "toy")
    assert info["steps"] == 4
    assert info["trainable_parameters"] == sum(t.numel() for t in trained(finished).values())


def test_native_and_lora_file_draw_the_samples_of_the_run(finished, base):
    with Image.open(finished / "samples" / "00-a-zyx-toy-seed0.png") as image:
        drawn = image.convert("RGB").tobytes()
        assert image.text["Comment"] == "AI-generated"
    pictures = {}
    for kind in ("base", "native", "lora"):
        pipe = load_pipeline(base)
        pipe.set_progress_bar_config(disable=True)
        if kind == "native":
            load_adapter(pipe, finished / "adapter.safetensors")
        if kind == "lora":
            pipe.load_lora_weights(finished, weight_name="pytorch_lora_weights.safetensors")
        generator = torch.Generator().manual_seed(0)
        image = pipe(
            "a zyx toy", num_inference_steps=2, guidance_scale=5.0, generator=generator
        ).images[0]
        pictures[kind] = image.tobytes()
    assert pictures["base"] != drawn
    for kind in ("native", "lora"):
        difference = max(abs(a - b) for a, b in zip(pictures[kind], drawn, strict=True))
        assert difference <= 1, kind


def test_a_text_encoder_adapter_travels_in_the_same_file(make_config, base):
    cfg = make_config(
        text_encoder={"train": True, "r": 8, "inner_r": 2},
        train={"steps": 3, "batch_size": 2, "learning_rate": 0.05, "lr_warmup_steps": 0},
    )
    run = dreambooth.run(cfg)
    assert {name.split(".")[0] for name in trained(run)} == {"unet", "text_encoder"}
    with Image.open(next((run / "samples").glob("00-*.png"))) as image:
        drawn = image.convert("RGB").tobytes()
    pipe = load_pipeline(base)
    pipe.set_progress_bar_config(disable=True)
    load_adapter(pipe, run / "adapter.safetensors")
    again = pipe(
        "a sks toy", num_inference_steps=1, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0].tobytes()  # fmt: skip
    assert max(abs(a - b) for a, b in zip(again, drawn, strict=True)) <= 1


def test_class_images_stay_the_same_when_sampling_changes_before_a_resume(make_config, tmp_path):
    train = {"steps": 2, "prior": "class_images", "prior_images": 2, "batch_size": 2}
    dreambooth.run(make_config(train=train))
    changed = {"prompts": ["a toy"], "n": 1, "steps": 2, "guidance": 2.0}
    dreambooth.run(make_config(train={**train, "steps": 3}, sample=changed), resume=True)


def test_the_snippets_of_the_model_card_run(finished, monkeypatch, tmp_path):
    card = (finished / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(finished)
    try:
        for snippet in snippets:
            (tmp_path / "snippet.py").write_text(snippet)
            runpy.run_path(str(tmp_path / "snippet.py"))
        with Image.open("example.png") as native, Image.open("example_lora.png") as lora:
            assert native.size == lora.size == (16, 16)
    finally:
        for name in ("example.png", "example_lora.png"):
            (finished / name).unlink(missing_ok=True)
    for link in re.findall(r"\]\(([\w/.]+)\)", card):
        assert (finished / link).is_file(), link


def test_before_and_after_have_the_same_seeds_and_differ(finished, base):
    with Image.open(finished / "before_after.png") as image:
        assert image.width > 4 * 128 and image.height > 3 * 128


def test_moving_average_is_what_is_saved(make_config, tmp_path):
    train = {"steps": 6, "batch_size": 1, "ema_decay": 0.99, "learning_rate": 0.05}
    run = dreambooth.run(make_config(train=train))
    average = load_file(run / "checkpoints" / "step-6" / "ema.safetensors")
    raw = load_file(run / "checkpoints" / "step-6" / "trained.safetensors")
    saved = trained(run)
    key = next(name for name in average if name.endswith("inner_B"))
    native = key.replace(".inner_B", ".nora_inner_B")
    assert torch.equal(saved[native], average[key])
    assert not torch.equal(average[key], raw[key])


def test_a_run_can_start_from_an_adapter(make_config, tmp_path, finished):
    cfg = make_config(
        adapter={"r": 8, "inner_r": 2, "init_from": str(finished)},
        train={"steps": 1, "batch_size": 1, "learning_rate": 1e-9},
    )
    start = trained(finished)
    after = trained(dreambooth.run(cfg))
    assert after.keys() == start.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-6)
    assert (
        load_run(finished).adapter.init == "gradient"
    )  # here orthogonal: all the same once trained
    other = make_config(adapter={"r": 8, "inner_r": 1, "init_from": str(finished)})
    with pytest.raises(UserError, match=r"inner_r = 2 \(here 1\); set the keys of \[adapter\]"):
        prepared(other, tmp_path)
    wider = {"r": 8, "inner_r": 2, "targets": ["attention", "feed_forward"]}
    with pytest.raises(UserError, match=r"32 adapted modules \(here \d+\)"):
        prepared(make_config(adapter={**wider, "init_from": str(finished)}), tmp_path)
    lora = make_config(adapter={"init_from": str(finished / "pytorch_lora_weights.safetensors")})
    with pytest.raises(UserError, match="init_from.*LoRA file"):
        prepared(lora, tmp_path)


def test_scene_pictures_do_not_change_what_is_trained(make_config, tmp_path):
    weights = []
    for number, prompts in enumerate((["a {trigger} {class_name}"], ["b", "c"])):
        cfg = make_config(
            sample={"prompts": prompts, "n": 1, "steps": 1, "every": number},
            output={"dir": str(tmp_path / str(number))},
        )
        weights.append(trained(dreambooth.run(cfg)))
    assert_same(*weights)


def test_captions_and_crops_reach_the_items(make_config, tmp_path, subject):
    own = tmp_path / "photos"
    own.mkdir()
    (own / "0.png").write_bytes((subject / "0.png").read_bytes())
    (own / "0.txt").write_text("a {trigger} {class_name} on a table")
    (own / "Thumbs.db").write_bytes(b"x")
    session = prepared(make_config(data={"subject": str(own), "flip": True}), tmp_path)
    assert session.inputs.prompts == ("a sks toy on a table",)
    assert len(session.inputs.latents) == 2
    assert session.inputs.prompt_rows == ((0, 0, 0), (0, 0, 0))


def test_switched_off_is_the_base_exactly(make_config, tmp_path):
    session = prepared(make_config(), tmp_path)
    unet = session.models["unet"]
    inputs = (torch.ones(1, 4, 8, 8), 500, session.inputs.class_conditioning.prompt_embeds)
    with torch.no_grad():
        before = unet(*inputs).sample
        for parameter in session.parameters.values():
            parameter.add_(0.1)
        moved = unet(*inputs).sample
        with switched_off(unet):
            off = unet(*inputs).sample
        again = unet(*inputs).sample
    assert torch.equal(off, before) and torch.equal(again, moved)
    assert not torch.equal(moved, before)
