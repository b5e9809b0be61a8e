"""Each optimiser: it learns, goes on to the bit, holds what is said, and is refused in time."""

import json
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.config import ConfigError, Train, UserError, load_config
from nora_diffusion.train import common, dreambooth
from nora_diffusion.train.checkpoint import newest_checkpoint
from nora_diffusion.train.optimizers import (
    check_optimizer,
    evaluation_weights,
    make_optimizer,
    optimizer_bytes,
)

RATES = {
    "adamw": 0.01,
    "adamw_8bit": 0.01,
    "adafactor": 0.01,
    "prodigy": 1.0,
    "schedule_free": 0.05,
}
SETTINGS = ["data.subject=photos", "data.class_name=dog"]


def fresh(name: str):
    """A core and its optimiser: one factor starts at 0, as half of the inner pairs do."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "a.inner_A": nn.Parameter(torch.randn(64, 80, generator=generator)),
        "a.inner_B": nn.Parameter(torch.zeros(80, 64)),
        "b.inner_A": nn.Parameter(torch.randn(2, 80, generator=generator)),
        "b.inner_B": nn.Parameter(torch.zeros(80, 2)),
    }
    cfg = Train(optimizer=name, learning_rate=RATES[name], weight_decay=0.01)
    return parameters, make_optimizer(cfg, [(list(parameters.values()), cfg.learning_rate)])


def goal() -> torch.Tensor:
    return torch.randn(80, 80, generator=torch.Generator().manual_seed(1))


def loss_of(parameters) -> torch.Tensor:
    product = sum(parameters[f"{n}.inner_B"] @ parameters[f"{n}.inner_A"] for n in "ab")
    return (product - goal()).square().mean()


def advance(parameters, optimizer, steps: range) -> None:
    for step in steps:
        common.set_lr(optimizer, common.lr_factor(step, "constant", 3, 100))
        loss_of(parameters).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_checkpoint(name: str, parameters, optimizer):
    """A new optimiser with the state of this one, as bytes and JSON carry it."""
    tensors = load(save(common.optimizer_tensors(optimizer, parameters)))
    numbers = json.loads(json.dumps(common.optimizer_numbers(optimizer, parameters)))
    resumed, again = fresh(name)
    common.copy_into(resumed, {k: p.detach() for k, p in parameters.items()})
    common.load_optimizer_tensors(again, resumed, tensors, numbers)
    return resumed, again


@pytest.mark.parametrize("name", RATES)
def test_it_learns(name):
    parameters, optimizer = fresh(name)
    before = loss_of(parameters).item()
    advance(parameters, optimizer, range(100))
    with evaluation_weights(optimizer, parameters):
        assert loss_of(parameters).item() < 0.8 * before


@pytest.mark.parametrize("name", RATES)
def test_two_interruptions_leave_no_trace(name):
    whole, optimizer = fresh(name)
    advance(whole, optimizer, range(15))
    wanted = common.optimizer_tensors(optimizer, whole)
    parts, again = fresh(name)
    for steps in (range(4), range(4, 9), range(9, 15)):
        advance(parts, again, steps)
        parts, again = through_a_checkpoint(name, parts, again)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    state = common.optimizer_tensors(again, parts)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in state)
    assert common.optimizer_numbers(again, parts) == common.optimizer_numbers(optimizer, whole)


@pytest.mark.parametrize("name", RATES)
def test_the_plan_knows_the_state(name, make_config):
    parameters, optimizer = fresh(name)
    advance(parameters, optimizer, range(1))
    state = {
        value.data_ptr(): value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    cfg = make_config(train={"optimizer": name, "learning_rate": RATES[name]})
    assert optimizer_bytes(cfg, parameters) == sum(state.values())


def test_eight_bits_are_for_large_matrices_only():
    parameters, optimizer = fresh("adamw_8bit")
    advance(parameters, optimizer, range(1))
    kinds = {name: optimizer.state[p]["state1"].dtype for name, p in parameters.items()}
    assert kinds["a.inner_A"] == torch.uint8 and kinds["b.inner_A"] == torch.float32


def test_prodigy_reports_the_rate_it_found():
    parameters, optimizer = fresh("prodigy")
    assert common.set_lr(optimizer, 1.0) == pytest.approx(1e-6)
    advance(parameters, optimizer, range(100))
    assert common.set_lr(optimizer, 0.5) == 0.5 * optimizer.param_groups[0]["d"]
    assert 1e-4 < common.set_lr(optimizer, 1.0) < 1


def test_schedule_free_is_used_at_its_average_and_trained_elsewhere():
    parameters, optimizer = fresh("schedule_free")
    advance(parameters, optimizer, range(20))
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    with evaluation_weights(optimizer, parameters):
        for name, parameter in parameters.items():  # y = (1 - beta) z + beta x
            z = optimizer.state[parameter]["z"]
            torch.testing.assert_close(trained[name], 0.1 * z + 0.9 * parameter)
            assert not torch.equal(parameter, trained[name])
    assert all(torch.equal(p, trained[name]) for name, p in parameters.items())


def test_the_saved_adapter_has_the_average_and_the_checkpoint_what_is_trained(make_config):
    train = {"steps": 6, "batch_size": 1, "optimizer": "schedule_free", "learning_rate": 0.05}
    run = dreambooth.run(make_config(train=train))
    from safetensors.torch import load_file

    saved, checkpoint = load_file(run / "adapter.safetensors"), newest_checkpoint(run)
    assert checkpoint is not None
    trained, state = checkpoint.tensors["trained"], checkpoint.tensors["optimizer"]
    key = next(name for name in trained if name.endswith(".inner_B"))
    average = (trained[key] - 0.1 * state[f"{key}/z"]) / 0.9
    native = saved[key.replace(".inner_B", ".nora_inner_B")]
    torch.testing.assert_close(native, average, rtol=1e-4, atol=1e-7)
    assert (native - trained[key]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["adafactor", "prodigy"])  # others: see the tests of resuming
def test_a_step_of_a_run_moves_the_adapter_only(name, make_config, tmp_path):
    from nora_diffusion.train.prepare import prepare
    from nora_diffusion.train.report import Report
    from tests.tiny import base_bytes

    train = {"steps": 2, "batch_size": 1, "optimizer": name, "learning_rate": RATES[name]}
    cfg = make_config(train=train)
    session = prepare(cfg, tmp_path, Report(tmp_path, total_steps=2, log_every=1))
    before = base_bytes(session.models["unet"])
    dreambooth.train(session)
    assert base_bytes(session.models["unet"]) == before
    moved = [layer.nora_inner_B["default"] for _, layer in iter_nora_layers(session.models["unet"])]
    assert moved and all(pair.any() for pair in moved)


@pytest.mark.parametrize(
    ("name", "library"),
    [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedule_free", "schedulefree")],
)
def test_a_missing_library_is_told_before_anything_is_written(
    name, library, make_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)  # what an import of it then meets
    cfg = make_config(train={"optimizer": name, "learning_rate": 1.0})
    with pytest.raises(UserError, match=rf'train.optimizer = "{name}".*{library}.*\[optimizers\]'):
        dreambooth.run(cfg)
    assert not (tmp_path / "run").exists()


def test_an_eight_bit_step_that_cannot_be_done_is_told_with_the_key(make_config, monkeypatch):
    cfg = make_config(train={"optimizer": "adamw_8bit"})
    check_optimizer(cfg)  # on the CPU it can

    def no_kernel(*args, **kwargs) -> None:
        raise NotImplementedError("no kernel for this device")

    # As on a device for which bitsandbytes was not compiled.
    monkeypatch.setattr("bitsandbytes.functional.optimizer_update_8bit_blockwise", no_kernel)
    with pytest.raises(UserError, match='"adamw_8bit".*on cpu .no kernel.*set it to "adamw"'):
        check_optimizer(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=prodigy"], "train.learning_rate = 0.001: .*set it to 1.0"),
        (
            ["train.optimizer=prodigy", "train.learning_rate=1", "text_encoder.learning_rate=0.1"],
            'text_encoder.learning_rate = 0.1: Prodigy finds one rate.*set it to "none"',
        ),
        (
            ["train.optimizer=schedule_free", "train.lr_schedule=cosine"],
            'train.lr_schedule = "cosine": .*set it to "constant"',
        ),
        (
            ["train.optimizer=schedule_free", "train.ema_decay=0.9"],
            'train.ema_decay = 0.9: .*set it to "none"',
        ),
        (["train.optimizer=adamw8bit"], "must be one of adamw, adamw_8bit, adafactor"),
    ],
)
def test_settings_that_contradict_an_optimiser_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("sd15", [*SETTINGS, *overrides])
    assert len(caught.value.problems) == 1
