"""`fit_start`: the inner pairs start along what the loss wants to move, and cost no storage."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig, fit_basis, fit_start, iter_nora_layers
from tests.adapter.test_statistics import batches, loss_of
from tests.adapter.test_statistics import fitted as adapted


def cores(model):
    """Every layer with the gradient of the loss with respect to its weight, taken plainly."""
    layers = dict(iter_nora_layers(model))
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers.values()]
    with model.disable_adapter():
        gradients = torch.autograd.grad(sum(loss_of(model)(x) for x in batches()), weights)
    for weight in weights:
        weight.requires_grad_(False)
    for layer, gradient in zip(layers.values(), gradients, strict=True):
        outer = layer.outer("default")
        yield layer, outer.outer_B.T @ gradient.flatten(1) @ outer.outer_A.T


def test_q_is_where_the_core_would_move_most_and_the_model_is_the_base():
    model = adapted("weight", r=8, inner_r=2, init="gradient")
    x = batches()[0]
    expected = model(x)
    seeded = [layer.nora_inner_A["default"].clone() for _, layer in iter_nora_layers(model)]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    fit_start(model, batches(), loss_of(model))
    assert torch.equal(model(x), expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    for (layer, core), before in zip(cores(model), seeded, strict=True):
        Q = layer.nora_inner_A["default"].detach()
        assert torch.allclose(Q @ Q.T, torch.eye(2), atol=1e-5)
        assert not layer.nora_inner_B["default"].any() and "default" not in layer.nora_initial_A
        caught = (core @ Q.T).square().sum() / core.square().sum()
        best = torch.linalg.svdvals(core)[:2].square().sum() / core.square().sum()
        assert float(caught) == pytest.approx(float(best), abs=1e-4)
        assert caught > (core @ before.T).square().sum() / core.square().sum() + 0.1


def test_the_start_of_a_data_basis_is_fitted_after_the_basis():
    model = adapted("gradient", init="gradient")
    with pytest.raises(RuntimeError, match="fit_basis"):
        fit_start(model, batches(), loss_of(model))
    fit_basis(model, batches(), loss_of(model))
    fit_start(model, batches(), loss_of(model))
    for layer, core in cores(model):
        # U and V are the gradient's own singular directions: its core is diagonal.
        Q = layer.nora_inner_A["default"].abs()
        assert torch.allclose(Q, torch.eye(2, core.shape[0]), atol=1e-3)


def test_neither_a_timestep_law_nor_dropout_hides_directions():
    free, bound = (
        adapted("weight", r=8, inner_r=2, init="gradient", **fields)
        for fields in ({}, {"timestep_rank": 1.0, "dropout": 0.5})
    )
    for model in (free, bound):
        for _, layer in iter_nora_layers(model):
            layer.set_progress(torch.full((6,), 0.999))
        fit_start(model, batches(), loss_of(model))
    for (_, a), (_, b) in zip(iter_nora_layers(free), iter_nora_layers(bound), strict=True):
        assert torch.equal(a.nora_inner_A["default"], b.nora_inner_A["default"])
        assert b.nora_config["default"].timestep_rank == 1.0


@pytest.mark.parametrize("loss", [lambda y: 0 * y.sum(), lambda y: y.sum() * float("nan")])
def test_without_a_usable_gradient_the_seeded_start_stays(loss):
    model = adapted("weight", init="gradient")
    seeded = [layer.nora_inner_A["default"].clone() for _, layer in iter_nora_layers(model)]
    fit_start(model, batches(), lambda x: loss(model(x)))
    for (_, layer), before in zip(iter_nora_layers(model), seeded, strict=True):
        assert torch.equal(layer.nora_inner_A["default"], before)


def test_a_step_that_fails_leaves_the_adapter_as_it_was():
    model = adapted("weight", init="gradient")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def broken(x):
        raise KeyError("no such batch")

    with pytest.raises(KeyError, match="no such batch"):
        fit_start(model, batches(), broken)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("fields", "arguments", "problem"),
    [
        ({}, {"adapter_name": "other"}, "no NoRA adapter called 'other'"),
        ({"init": "sigma"}, {}, "init='sigma'; only \"gradient\" is fitted"),
        ({}, {"batches": []}, "no batches"),
    ],
)
def test_what_cannot_be_fitted_is_named(fields, arguments, problem):
    model = adapted("weight", **{"init": "gradient", **fields})
    given = {"batches": batches(), "step": loss_of(model), **arguments}
    with pytest.raises(ValueError, match=problem):
        fit_start(model, **given)


def test_a_merged_adapter_must_be_unmerged_first():
    model = adapted("weight", init="gradient")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        fit_start(model, batches(), loss_of(model))


def test_it_learns_faster_than_a_seeded_start():
    """A task whose change lies in few directions: the fitted start has them from the first step."""
    torch.manual_seed(0)
    base, change = nn.Linear(64, 64, bias=False), torch.randn(64, 2) @ torch.randn(2, 64) / 30
    xs = [torch.randn(128, 64) for _ in range(4)]
    wanted = [(x @ (base.weight + change).T).detach() for x in xs]
    left = {}
    for init in ("orthogonal", "gradient"):
        torch.manual_seed(1)
        layer = nn.Sequential(nn.Linear(64, 64, bias=False))
        layer[0].load_state_dict(base.state_dict())
        model = get_peft_model(layer, NoraConfig(r=64, inner_r=2, init=init, target_modules=["0"]))
        loss = lambda i, model=model: (model(xs[i]) - wanted[i]).square().mean()  # noqa: E731
        if init == "gradient":
            fit_start(model, range(4), loss)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for step in range(30):
            optimizer.zero_grad()
            loss(step % 4).backward()
            optimizer.step()
        left[init] = sum(float(loss(i).detach()) for i in range(4))
    assert left["gradient"] < 0.9 * left["orthogonal"], left
