"""The functions all recipes share."""

import os
import signal

import pytest
import torch
from torch import nn

from nora_diffusion.train import common


def test_streams_of_one_seed_differ_and_repeat():
    seeds = {
        common.derive_seed(seed, name, step)
        for seed in (0, 1)
        for name in ("noise", "dropout")
        for step in range(50)
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # The value itself is part of what makes a run reproducible elsewhere.
    assert common.derive_seed(0, "noise", 3, 0) == common.derive_seed(0, "noise", 3, 0)
    first = torch.randn(3, generator=common.step_generator(0, 3, 0))
    dropped = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(torch.randn(3, generator=common.step_generator(0, 3, 0)), first)
    assert torch.equal(torch.rand(3), dropped)


def test_every_pass_of_every_step_draws_its_own_noise_and_dropout():
    drawn = set()
    for step in range(4):
        for micro_step in range(3):
            generator = common.step_generator(0, step, micro_step)
            drawn |= {torch.randn(1, generator=generator).item(), torch.rand(1).item()}
    assert len(drawn) == 2 * 4 * 3


def test_warm_up_rises_to_the_peak_and_schedules_end_at_zero():
    factors = [common.lr_factor(step, "constant", 4, 10) for step in range(10)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:] == [1.0] * 6
    for schedule in ("cosine", "linear"):
        factors = [common.lr_factor(step, schedule, 4, 10) for step in range(11)]
        assert factors[4] == 1.0
        assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False))
        assert factors[10] == pytest.approx(0, abs=1e-12)
        assert 0 < factors[9]
    assert common.lr_factor(7, "cosine", 4, 10) == pytest.approx(0.5)


def test_moving_average_follows_its_definition_and_steps_aside():
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = common.MovingAverage({"p": parameter}, decay=0.5)
    expected = 1.0
    for step, value in enumerate([2.0, 3.0, 5.0, 8.0, 1.0, 0.0, 0.0, 4.0, 4.0, 4.0]):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.average["p"].item() == pytest.approx(expected)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert parameter.item() == pytest.approx(expected)
        raise RuntimeError("inside")
    assert parameter.item() == 4.0


def test_optimiser_state_survives_a_round_trip_bit_for_bit():
    def steps(parameters, optimizer, count, start):
        for step in range(start, start + count):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in "abc"}
        groups = [([parameters["a"], parameters["b"]], 0.1), ([parameters["c"]], 0.01)]
        return parameters, common.make_adamw(groups, 0.1)

    whole, optimizer = fresh()
    steps(whole, optimizer, 6, 0)

    half, optimizer = fresh()
    steps(half, optimizer, 3, 0)
    saved = common.optimizer_tensors(optimizer, half)
    resumed, optimizer = fresh()
    common.copy_into(resumed, {name: p.detach() for name, p in half.items()})
    common.load_optimizer_tensors(optimizer, resumed, saved)
    steps(resumed, optimizer, 3, 3)
    for name in "abc":
        assert torch.equal(resumed[name], whole[name])
        assert not torch.equal(half[name], whole[name])


def test_learning_rates_keep_their_ratio():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = common.make_adamw([([a], 0.1), ([b], 0.01)], 0.0)
    assert common.set_lr(optimizer, 0.5) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize(
    "values",
    [{"a": torch.zeros(2)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3), "b": torch.ones(1)}],
)
def test_values_that_do_not_fit_are_refused(values):
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="a|b"):
        common.copy_into({"a": parameter}, values)
    assert torch.equal(parameter, torch.ones(3))


def test_guard_stops_on_what_is_not_finite_and_on_explosion_only():
    guard = common.DivergenceGuard()
    for step in range(200):  # a loss between 0.01 and 2 is nothing unusual
        assert guard.check(2.0 if step % 3 else 0.01, 5.0) is None
    assert "loss is nan" in str(guard.check(float("nan"), 1.0))
    assert "norm is inf" in str(guard.check(1.0, float("inf")))
    assert any(guard.check(500.0, 1.0) for _ in range(10))
    scaled = common.DivergenceGuard()
    assert scaled.check(1.0, None) is None


def test_guard_goes_on_from_the_first_losses_of_a_resumed_run():
    guard = common.DivergenceGuard([0.1] * 10)
    answers = [guard.check(11.0, 1.0) for _ in range(10)]
    assert answers[:9] == [None] * 9
    assert "exploded" in str(answers[9])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_once_and_then_obeyed(number):
    before = signal.getsignal(number)
    with common.StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.name == signal.Signals(number).name
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_digest_changes_with_any_bit():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    digest = common.weights_digest(layer)
    assert digest == common.weights_digest(layer)
    with torch.no_grad():
        layer.weight[2, 2] = torch.nextafter(layer.weight[2, 2], torch.tensor(9.0))
    assert common.weights_digest(layer) != digest
