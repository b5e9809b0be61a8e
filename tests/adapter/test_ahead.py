"""What is computed ahead of passes: the same answers in fewer products, and none kept too long."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nora_diffusion.adapter import NoraConfig, joint_cores, kept_updates
from nora_diffusion.adapter.switch import switched_off
from tests.adapter.toys import INITS, LAYERS, adapted, base_of, inner, input_for, perturb


def far(found, expected):
    """Relative distance."""
    return float((found - expected).norm() / expected.norm())


class Products(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def products(layer, x):
    with Products() as found:
        layer(x)
    return found.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_kept_updates_give_the_same_output_in_fewer_products(kind, init, dtype):
    layer = perturb(adapted(base_of(kind).to(dtype), init=init, scaling=0.7))
    x = input_for(kind).to(dtype)
    expected, before = layer(x), products(layer, x)
    assert far(expected, layer.get_base_layer()(x)) > 0.05
    with kept_updates(layer):
        assert far(layer(x), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert products(layer, x) < before
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_an_adapter_at_its_start_is_the_base_to_the_last_bit(init, dtype):
    layer = adapted(base_of("linear").to(dtype), init=init)
    x = input_for("linear").to(dtype)
    with kept_updates(layer):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


@torch.no_grad()
def test_the_values_are_those_at_the_first_pass_until_the_block_ends():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    with kept_updates(layer):
        first = layer(x)
        perturb(layer)
        assert torch.equal(layer(x), first)
        with kept_updates(layer):  # nested: the outer block's
            assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), first)
    assert far(layer(x), first) > 0.05
    with kept_updates(layer):
        assert far(layer(x), first) > 0.05


@torch.no_grad()
def test_scales_and_adapters_may_be_switched_inside():
    layer, x = adapted(base_of("linear")), input_for("linear")
    layer.update_layer("second", NoraConfig(r=6, basis="random"), 6, 3)
    layer.derive_factors("second")
    perturb(layer)
    base = layer.get_base_layer()(x)

    def outputs():
        found = []
        for active in (["default"], ["second"], ["default", "second"]):
            layer.set_adapter(active)
            for scale in (1.0, -0.5):
                layer.set_scale("default", scale)
                found.append(layer(x))
        with switched_off(layer):
            found.append(layer(x))
        layer.enable_adapters(False)
        found.append(layer(x))
        layer.enable_adapters(True)
        return found

    expected = outputs()
    with kept_updates(layer):
        for found, wanted in zip(outputs(), expected, strict=True):
            assert far(found, wanted) < 1e-5
    assert torch.equal(expected[-1], base) and torch.equal(expected[-2], base)


@torch.no_grad()
def test_merged_layers_are_left_alone():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    expected = layer(x)
    with kept_updates(layer):
        layer(x)
        layer.merge()
        assert far(layer(x), expected) < 1e-5
        layer.unmerge()
        assert far(layer(x), expected) < 1e-5


@pytest.mark.parametrize("init", INITS)
def test_passes_with_gradients_train_as_ever(init):
    layer, x = perturb(adapted(base_of("linear"), init=init)), input_for("linear")
    other = copy.deepcopy(layer)
    other(x).square().sum().backward()
    with kept_updates(layer):
        with torch.no_grad():
            layer(x)
        layer(x).square().sum().backward()
    for found, wanted in zip(inner(layer), inner(other), strict=True):
        assert torch.equal(found.grad, wanted.grad)


@torch.no_grad()
def test_a_timestep_law_and_dropout_are_followed_inside():
    x = input_for("linear")
    layer = perturb(adapted(base_of("linear"), timestep_rank=1.0))
    layer.set_progress(torch.tensor([0.9, 0.1]))
    expected = layer(x)
    with kept_updates(layer):
        assert torch.equal(layer(x), expected)
    layer = perturb(adapted(base_of("linear"), dropout=0.5)).train()
    with kept_updates(layer):
        assert far(layer(x), layer(x)) > 1e-3
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_a_compiled_layer_computes_its_own_update():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad(), kept_updates(layer):
        first = compiled(x)
        perturb(layer)
        assert far(compiled(x), first) > 0.05


def test_an_exception_ends_the_block():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    with pytest.raises(ZeroDivisionError), torch.no_grad(), kept_updates(layer):
        first = layer(x)
        _ = 1 / 0
    with torch.no_grad():
        perturb(layer)
        assert far(layer(x), first) > 0.05


# ---- cores computed together ---------------------------------------------------------------------


def stacked(init="orthogonal", dtype=torch.float32, count=4, **fields):
    """Several adapted layers in a row, of two shapes, moved from their start."""
    torch.manual_seed(0)
    layers = []
    for index in range(count):
        base = nn.Linear(24, 24).to(dtype).requires_grad_(False)
        layers.append(adapted(base, init=init, r=8 if index % 2 else 6, **fields))
    return perturb_all(nn.Sequential(*layers))


def perturb_all(model):
    for layer in model:
        perturb(layer, 0.3)
    return model


def gradients(model, x):
    """Of all that is trained, and of the input, from one pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).float().square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def together(model, x):
    with joint_cores(model):
        return gradients(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_joint_cores_train_as_those_of_each_layer(init, dtype):
    model, x = stacked(init, dtype, scaling=0.7), input_for("linear").to(dtype)
    with Products() as alone:
        expected = gradients(model, x)
    with Products() as found:
        given = together(model, x)
    for one, wanted in zip(given, expected, strict=True):
        assert far(one, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert found.count < alone.count


@pytest.mark.parametrize("init", INITS)
def test_joint_cores_begin_at_the_base_to_the_last_bit(init):
    base = base_of("linear").to(torch.bfloat16)
    x = input_for("linear").to(torch.bfloat16)
    layer = adapted(base, init=init)
    with joint_cores(layer):
        assert torch.equal(layer(x), base(x))


def test_recomputed_blocks_take_the_same_cores():
    model, x = stacked(), input_for("linear")
    expected = gradients(model, x)

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.blocks, x, use_reentrant=False)

    for one, wanted in zip(together(Recomputed(), x), expected, strict=True):
        assert far(one, wanted) < 1e-5


def test_every_block_has_cores_of_its_own_values():
    model, x = stacked(), input_for("linear")
    first = together(model, x)
    perturb_all(model)
    expected = gradients(model, x)
    assert far(expected[0], first[0]) > 1e-3
    for one, wanted in zip(together(model, x), expected, strict=True):
        assert far(one, wanted) < 1e-5


def test_an_adapter_that_is_switched_off_or_scaled_inside_computes_its_own():
    model, x = stacked(), input_for("linear")
    base = nn.Sequential(*(layer.get_base_layer() for layer in model))
    with joint_cores(model):
        with switched_off(model):
            assert torch.equal(model(x), base(x))
        model[0].set_scale("default", 0.5)
        scaled = model(x)
    assert far(scaled, model(x)) < 1e-5


def test_a_timestep_law_keeps_its_own_cores():
    model, x = stacked(timestep_rank=1.0), input_for("linear")
    for layer in model:
        layer.set_progress(torch.tensor([0.9, 0.1]))
    expected = gradients(model, x)
    for one, wanted in zip(together(model, x), expected, strict=True):
        assert torch.equal(one, wanted)


def test_adapters_that_share_outer_factors_are_summed():
    model, x = stacked(), input_for("linear")
    for layer in model:
        r = layer.r["default"]
        layer.update_layer("second", NoraConfig(r=r), r, 2)
        layer.set_adapter(["default", "second"])
        perturb(layer, 0.3)
    expected = gradients(model, x)
    for one, wanted in zip(together(model, x), expected, strict=True):
        assert far(one, wanted) < 1e-5
