"""Quantised base layers, through PEFT's generic backend: a real int8 one here, and bitsandbytes."""

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn

from nora_diffusion.adapter import NoraConfig, fit_basis, iter_nora_layers, model, state
from tests.adapter.toys import perturb


class Int8Linear(nn.Module):
    """Symmetric int8 with a scale per row, dequantised in every forward pass."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.quantise(linear.weight)

    def quantise(self, weight):
        scale = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        self.register_buffer("scale", scale)
        codes = (weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def dequantise(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantise().to(x.dtype), self.bias.to(x.dtype))


class Int8Backend(QuantizationBackend):
    supports_merge = True
    layer_type = "linear"
    backend_name = "int8"

    def get_base_weight(self, base_layer):
        return base_layer.dequantise()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().quantise(weight_data)


@pytest.fixture
def int8(monkeypatch):
    """Make PEFT's resolver know the layer, as it knows those of its own backends."""

    def use(backend):
        def resolve(base_layer, **kwargs):
            return backend if isinstance(base_layer, Int8Linear) else None

        for module in (model, state):
            monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
        torch.manual_seed(0)
        return nn.Sequential(Int8Linear(nn.Linear(32, 24)), nn.ReLU(), nn.Linear(24, 4))

    return use


def nora(**fields):
    return NoraConfig(**{"r": 8, "inner_r": 4, "target_modules": ["0"], **fields})


def batch():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("init", ["orthogonal", "sigma"])
def test_a_quantised_base_is_adapted_and_trained(int8, init):
    base = int8(Int8Backend())
    expected = base(batch())
    adapted = get_peft_model(base, nora(init=init))
    assert torch.equal(adapted(batch()), expected)
    ((_, layer),) = iter_nora_layers(adapted)
    assert "quantization_backend='int8'" in repr(layer)
    assert layer.nora_outer_A["default"].dtype == torch.float32
    codes = layer.get_base_layer().weight.clone()
    adapted(batch()).square().sum().backward()
    assert layer.nora_inner_B["default"].grad.norm() > 0
    assert torch.equal(layer.get_base_layer().weight, codes)
    # bfloat16 inputs are not widened to meet float32 factors.
    assert layer(batch().bfloat16()).dtype == torch.bfloat16


def test_merging_requantises_and_unmerging_restores_every_code(int8):
    adapted = get_peft_model(int8(Int8Backend()), nora())
    ((_, layer),) = iter_nora_layers(adapted)
    perturb(layer)
    x, before = batch(), {k: v.clone() for k, v in layer.get_base_layer().state_dict().items()}
    unmerged = layer(x)
    dense = layer.get_base_weight() + layer.get_delta_weight("default")
    layer.merge(safe_merge=True)
    merged = layer.get_base_weight()
    assert (merged - dense).abs().max() <= dense.abs().max() / 127
    assert (layer(x) - unmerged).abs().max() < 0.1 * unmerged.abs().max()
    layer.unmerge()
    after = layer.get_base_layer().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(layer(x), unmerged)


def test_a_base_that_cannot_be_dequantised_needs_another_basis(int8):
    base = int8(ForwardOnlyQuantizationBackend("forward-only"))
    with pytest.raises(TypeError, match="not supported for forward-only"):
        get_peft_model(base, nora())


def test_the_gradient_of_a_quantised_weight_is_refused_and_activations_work(int8):
    for basis in ("gradient", "activation"):
        adapted = get_peft_model(int8(Int8Backend()), nora(basis=basis))

        def step(x, adapted=adapted):
            return adapted(x).square().mean()

        if basis == "gradient":
            with pytest.raises(ValueError, match="quantised.*basis='activation'"):
                fit_basis(adapted, [batch()], step)
        else:
            fit_basis(adapted, [batch()], step)
            assert torch.isfinite(adapted(batch())).all()


@pytest.mark.parametrize("training", [True, False])
def test_bitsandbytes_four_bit(training):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    quantised = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(nn.Linear(64, 64).state_dict())
    base = nn.Sequential(quantised.to("cpu")).train(training)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = base(x)
        adapted = get_peft_model(base, nora()).train(training)
        assert torch.equal(adapted(x), expected)
        ((_, layer),) = iter_nora_layers(adapted)
        perturb(layer)
        unmerged = adapted(x)
        layer.merge()
        assert (adapted(x) - unmerged).norm() < 0.2 * unmerged.norm()
        layer.unmerge()
        assert torch.equal(adapted(x), unmerged)
