"""The layer's arithmetic: identity at the start, exact updates, small memory, every layer type."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.layer import Conv2d, Linear
from tests.adapter.toys import (
    BASES_OF_TYPE,
    INITS,
    LAYERS,
    adapted,
    base_of,
    inner,
    input_for,
    perturb,
)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_step_zero_is_the_base_to_the_last_bit(kind, init):
    base, x = base_of(kind), input_for(kind)
    expected = base(x)
    assert torch.equal(adapted(base, init=init)(x), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_the_base_plus_the_delta_weight(kind, init):
    layer = perturb(adapted(base_of(kind), init=init))
    x = input_for(kind)
    changed = copy.deepcopy(layer.get_base_layer())
    with torch.no_grad():
        changed.weight += layer.get_delta_weight("default")
    assert not torch.allclose(layer(x), layer.get_base_layer()(x), atol=1e-2)
    assert torch.allclose(layer(x), changed(x), atol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_delta_is_the_formula_of_the_method(init):
    layer = perturb(adapted(base_of("linear"), init=init, scaling=0.7))
    U, V = layer.nora_outer_B["default"], layer.nora_outer_A["default"]
    P, Q = inner(layer)
    root = layer.outer("default").singular_values.sqrt().diag()
    initial = root[:, :4] @ root[:4] if init == "sigma" else torch.zeros(8, 8)
    expected = 0.7 * U @ (P @ Q - initial) @ V
    assert torch.allclose(layer.get_delta_weight("default"), expected, atol=1e-5)
    weight = layer.get_base_layer().weight
    assert torch.allclose(
        U.T @ weight, layer.outer("default").singular_values[:, None] * V, atol=1e-5
    )


@pytest.mark.parametrize(("init", "rank"), [("orthogonal", 4), ("sigma", 8)])
@pytest.mark.parametrize("kind", LAYERS)
def test_lora_factors_are_exact_and_of_the_promised_rank(kind, init, rank):
    layer = perturb(adapted(base_of(kind), init=init, scaling=1.3))
    lora_A, lora_B = layer.lora_factors("default")
    assert lora_A.shape[0] == lora_B.shape[1] == rank
    assert lora_A.dtype == lora_B.dtype == torch.float32
    product = layer.from_matrix(lora_B.flatten(1) @ lora_A.flatten(1))
    assert torch.allclose(product, layer.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_factors_lose_little_in_half_precision(dtype):
    layer = adapted(base_of("linear"), init="sigma")
    for step in (0.0, 0.01):
        lora_A, lora_B = perturb(layer, step).lora_factors("default")
        product = (lora_B.to(dtype) @ lora_A.to(dtype)).float()
        delta = layer.get_delta_weight("default")
        assert (product - delta).norm() <= 0.02 * delta.norm()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_reaches_only_the_inner_pair_and_the_input(kind, init):
    layer = adapted(base_of(kind), init=init)
    x = input_for(kind).requires_grad_()
    layer(x).square().sum().backward()
    with_gradient = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_gradient == {"nora_inner_A.default", "nora_inner_B.default"}
    assert x.grad.abs().sum() > 0
    P, Q = inner(layer)
    moved = [parameter.grad.abs().sum() > 0 for parameter in (P, Q)]
    # With P0 = 0 only P learns in the first step, but through all of Q0's directions.
    assert moved == ([True, False] if init == "orthogonal" else [True, True])


def test_only_orthogonal_reaches_the_whole_core_in_the_first_step():
    beyond = {}
    for init in INITS:
        layer = adapted(base_of("linear"), init=init)
        layer(input_for("linear")).square().sum().backward()
        P, Q = inner(layer)
        step = P.grad @ Q + P @ Q.grad
        beyond[init] = step[4:, 4:].norm().item()
    assert beyond["sigma"] == 0 < 0.1 < beyond["orthogonal"]


def test_gradients_match_those_of_the_dense_formula():
    layer = perturb(adapted(base_of("linear"), init="sigma"))
    x, (P, Q) = input_for("linear"), inner(layer)
    layer(x).square().sum().backward()
    found = [P.grad.clone(), Q.grad.clone()]
    U, V = layer.nora_outer_B["default"], layer.nora_outer_A["default"]
    initial = layer.nora_initial_B["default"] @ layer.nora_initial_A["default"]
    base = layer.get_base_layer()
    dense = nn.functional.linear(x, base.weight + U @ (P @ Q - initial) @ V, base.bias)
    expected = torch.autograd.grad(dense.square().sum(), [P, Q])
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("init", INITS)
def test_backward_keeps_the_hidden_features_and_not_the_input(init, dropout):
    layer = adapted(
        nn.Linear(512, 512, bias=False).requires_grad_(False), init=init, dropout=dropout
    ).train()
    frozen = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in frozen:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1000, 512)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    hidden, mask = 1000 * 8 * 4, 1000 * 8 * 5 if dropout else 0
    assert sum(saved.values()) <= hidden + mask + 4096 < x.nbytes / 10


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_unbiased_and_off_in_eval(kind):
    layer = perturb(adapted(base_of(kind), dropout=0.5))
    x, base = input_for(kind), layer.get_base_layer()
    exact = layer.eval()(x) - base(x)
    assert torch.equal(layer(x) - base(x), exact)
    layer.train()
    assert not torch.allclose(layer(x) - base(x), exact, atol=1e-3)
    torch.manual_seed(0)
    many = x[:1].repeat(2000, *[1] * (x.ndim - 1))
    mean = (layer(many) - base(many)).mean(0)
    assert (mean - exact[0]).norm() < 0.1 * exact[0].norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_scale_zero_and_disabling_give_the_base_exactly(kind):
    layer = perturb(adapted(base_of(kind)))
    x = input_for(kind)
    expected = layer.get_base_layer()(x)
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(x), expected)
    layer.set_scale("default", 1.0)
    assert not torch.allclose(layer(x), expected, atol=1e-2)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)


def test_scales_multiply_the_update_and_can_be_taken_back():
    layer = perturb(adapted(base_of("linear"), scaling=0.5))
    x, base = input_for("linear"), layer.get_base_layer()
    once = layer(x) - base(x)
    layer.scale_layer(3.0)
    assert torch.allclose(layer(x) - base(x), 3 * once, atol=1e-5)
    layer.unscale_layer(3.0)
    assert torch.allclose(layer(x) - base(x), once, atol=1e-6)
    layer.set_scale("default", 4.0)
    assert layer.scaling["default"] == 2.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 0.5
    with pytest.raises(ValueError, match="cannot unscale by 0"):
        layer.unscale_layer(0)


def two_adapters(second, kind="linear", **first):
    layer = adapted(base_of(kind), **first)
    config = NoraConfig(**{"r": 8, "inner_r": 4, **first, **second})
    layer.update_layer("second", config, config.r, config.inner_r)
    layer.derive_factors("second")
    return perturb(layer)


@pytest.mark.parametrize("second", [{}, {"r": 6}, {"seed": 1}, {"init": "sigma"}, {"scaling": 2.0}])
@pytest.mark.parametrize("kind", LAYERS)
def test_active_adapters_sum(kind, second):
    layer, x = two_adapters(second, kind), input_for(kind)
    base = layer.get_base_layer()(x)
    parts = []
    for names in (["default"], ["second"], ["default", "second"]):
        layer.set_adapter(names)
        parts.append(layer(x) - base)
    assert torch.allclose(parts[0] + parts[1], parts[2], atol=1e-5)
    assert min(part.norm().item() for part in parts) > 0.1


def test_adapters_of_one_spec_share_their_outer_factors_through_moves_and_copies():
    layer = two_adapters({"inner_r": 2, "init": "sigma"})

    for moved in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to(torch.float64).float()):
        for outer in (moved.nora_outer_A, moved.nora_outer_B):
            assert outer["default"].data_ptr() == outer["second"].data_ptr()
    x = input_for("linear")
    assert torch.allclose(layer(x), layer.to(torch.float64)(x.double()).float(), atol=1e-5)


@pytest.mark.parametrize("second", [{"r": 6}, {"seed": 1}, {"basis": "random"}])
def test_adapters_of_other_specs_do_not_share(second):
    outers = two_adapters(second).nora_outer_A
    assert outers["default"].data_ptr() != outers["second"].data_ptr()


def test_deleting_one_adapter_leaves_the_other():
    layer, x = two_adapters({}), input_for("linear")
    layer.set_adapter(["second"])
    expected = layer(x)
    layer.delete_adapter("default")
    assert torch.equal(layer(x), expected)
    assert set(layer.nora_outer_A) == {"second"}
    layer.delete_adapter("second")
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_half_base_keeps_a_float_inner_pair(kind, dtype):
    base, x = base_of(kind).to(dtype), input_for(kind).to(dtype)
    expected = base(x)
    layer = adapted(base, init="sigma")
    assert {p.dtype for p in inner(layer)} == {torch.float32}
    assert layer.nora_outer_A["default"].dtype == dtype
    assert torch.equal(layer(x), expected)
    exact = adapted(base_of(kind).to(dtype).float(), init="sigma")
    perturb(layer), perturb(exact)
    output, reference = layer(x), exact(x.float())
    assert output.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (output.float() - reference).abs().max() < tolerance * reference.abs().max()
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in inner(layer))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_keeps_the_identity_and_small_updates(kind, init):
    layer, x = adapted(base_of(kind), init=init), input_for(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.get_base_layer()(x))
    # A step far below bfloat16's resolution of P0 Q0 itself must not be lost to cancellation.
    perturb(layer, 1e-4)
    delta = layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        core = layer.core("default").float()
    U, V = layer.nora_outer_B["default"], layer.nora_outer_A["default"]
    assert (layer.from_matrix(U @ core @ V) - delta).norm() < 0.02 * delta.norm()


class WholeLinear(nn.Linear):
    """A base that answers in float32 under autocast, as quantised layers do."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_autocast_does_not_round_a_base_that_answers_in_float32():
    torch.manual_seed(0)
    base, x = WholeLinear(24, 16).requires_grad_(False), input_for("linear")
    layer = adapted(base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), base(x))
    perturb(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.float32
    update = output - base(x)
    assert (update - (layer(x) - base(x))).norm() < 0.02 * update.norm()


def law(k, k_min, alpha, progress):
    return int((1 - progress) ** alpha * (k - k_min) + 1e-4) + k_min


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("alpha", "k_min"), [(1.0, 1), (2.0, 0), (0.5, 2), (0.0, 1)])
def test_each_sample_uses_the_inner_dimensions_of_its_own_timestep(kind, init, alpha, k_min):
    rank = {"alpha": alpha, "k_min": k_min}
    layer = perturb(adapted(base_of(kind), init=init, timestep_rank=rank))
    progress = torch.tensor([0.0, 0.3, 0.75, 1.0])
    x, base = input_for(kind, samples=4), layer.get_base_layer()
    full = layer(x)
    layer.set_progress(progress)
    output = layer(x)
    for index, value in enumerate(progress.tolist()):
        k = law(4, k_min, alpha, value)
        small = copy.deepcopy(layer)
        small.set_progress(None)
        with torch.no_grad():
            P, _ = inner(small)
            start = small.nora_initial_B["default"] if init == "sigma" else torch.zeros_like(P)
            P[:, k:] = 0
            if init == "sigma":
                start[:, k:] = 0
        assert torch.allclose(output[index], small(x)[index], atol=1e-5)
    assert torch.allclose(output[0], full[0], atol=1e-5)
    if k_min == 0 and alpha > 0:
        assert torch.allclose(output[-1], base(x)[-1], atol=1e-6)
    layer.set_progress(None)
    assert torch.equal(layer(x), full)


def test_progress_must_fit_the_batch():
    layer = perturb(adapted(base_of("linear"), timestep_rank=1.0))
    layer.set_progress(torch.zeros(3))
    with pytest.raises(ValueError, match="3 values for a batch of 2"):
        layer(input_for("linear"))
    layer.set_progress(torch.zeros(1))
    layer(input_for("linear"))


def test_progress_is_ignored_by_adapters_without_a_law():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    expected = layer(x)
    layer.set_progress(torch.ones(2))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular"},
        {"kernel_size": 1, "bias": False},
    ],
)
def test_convolutions_of_every_geometry(options):
    torch.manual_seed(0)
    base = nn.Conv2d(6, 10, **{"kernel_size": 3, **options}).requires_grad_(False)
    layer, x = perturb(adapted(base)), torch.randn(2, 6, 9, 8)
    changed = copy.deepcopy(base)
    changed.weight.add_(layer.get_delta_weight("default"))
    assert torch.allclose(layer(x), changed(x), atol=1e-5)


def test_inputs_of_any_number_of_dimensions():
    layer = perturb(adapted(base_of("linear"), timestep_rank=1.0))
    layer.set_progress(torch.tensor([0.0, 0.0]))
    for shape in ((2, 24), (2, 3, 24), (2, 3, 5, 24)):
        x = torch.randn(shape)
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        expected = nn.functional.linear(x, weight, layer.get_base_layer().bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_init_weights_false_changes_the_output():
    for init in INITS:
        layer = adapted(base_of("linear"), init=init, init_weights=False)
        x = input_for("linear")
        assert not torch.allclose(layer(x), layer.get_base_layer()(x), atol=1e-2)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("basis", BASES_OF_TYPE)
def test_every_weight_basis_works_with_every_init(basis, init):
    layer, x = adapted(base_of("linear"), basis=basis, init=init), input_for("linear")
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    before = [p.detach().clone() for p in inner(layer)]
    optimiser = torch.optim.SGD(inner(layer), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        optimiser.step()
    assert all((p - q).abs().max() > 0 for p, q in zip(inner(layer), before, strict=True))


def test_repr_tells_what_an_adapter_is():
    layer = adapted(base_of("linear"), scaling=0.5)
    text = repr(layer)
    for part in (
        "[default] r=8, inner_r=4, scaling=0.5",
        "64 parameters",
        "active",
        "basis=weight",
    ):
        assert part in text
    layer.merge()
    assert "64 parameters, merged" in repr(layer)


def test_layer_types():
    kinds = {kind: type(adapted(base_of(kind))) for kind in LAYERS}
    assert kinds == {"linear": Linear, "conv1d": Linear, "conv2d": Conv2d}
    assert isinstance(base_of("conv1d"), Conv1D)


def test_iter_nora_layers_names_the_modules():
    model = nn.ModuleDict({"a": adapted(base_of("linear")), "b": nn.Linear(2, 2)})
    assert [name for name, _ in iter_nora_layers(model)] == ["a"]
