"""`fit_basis`: the data-driven bases, from any model and any batches."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig, fit_basis, iter_nora_layers
from tests.adapter.toys import perturb

KINDS = ("activation", "gradient")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.conv(x)).mean((-1, -2)))))


def fitted(basis, model=None, **fields):
    torch.manual_seed(0)
    config = NoraConfig(
        **{"r": 4, "inner_r": 2, "basis": basis, "target_modules": ["conv", "inner"], **fields}
    )
    return get_peft_model(model or Model(), config)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 5, 5, generator=generator) for _ in range(count)]


def loss_of(model):
    return lambda x: model(x).square().mean()


@pytest.mark.parametrize("basis", KINDS)
def test_an_adapter_that_was_not_fitted_says_what_to_do(basis):
    with pytest.raises(RuntimeError, match="fit_basis.*portable"):
        fitted(basis)(batches()[0])


@pytest.mark.parametrize("init", ["orthogonal", "sigma"])
@pytest.mark.parametrize("basis", KINDS)
def test_a_fitted_adapter_starts_as_the_base_and_trains(basis, init):
    model = fitted(basis, init=init)
    x = batches()[0]
    with model.disable_adapter():
        expected = model(x)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fit_basis(model, batches(), loss_of(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(x), expected)
    loss_of(model)(x).backward()
    assert all(
        layer.nora_inner_B["default"].grad.norm() > 0 for _, layer in iter_nora_layers(model)
    )


def test_the_gradient_basis_spans_the_gradient_of_the_weights():
    model = fitted("gradient", r=8)
    fit_basis(model, batches(), loss_of(model))
    plain = Model()
    plain.load_state_dict(
        {
            k.replace(".base_layer", ""): v
            for k, v in model.base_model.model.state_dict().items()
            if "nora" not in k
        }
    )
    sum(loss_of(plain)(x) for x in batches()).backward()
    for name, weight in (("conv", plain.conv.weight), ("inner", plain.inner.weight)):
        layer = model.base_model.model.get_submodule(name)
        gradient = weight.grad.flatten(1)
        U, V = layer.nora_outer_B["default"], layer.nora_outer_A["default"]
        captured = (U.T @ gradient @ V.T).square().sum() / gradient.square().sum()
        best = torch.linalg.svdvals(gradient)[:8].square().sum() / gradient.square().sum()
        assert captured > 0.999 * best


def test_the_activation_basis_follows_the_loud_inputs():
    model = fitted("activation", target_modules=["conv"], r=1, inner_r=1)
    loud = [x * torch.tensor([1e-3, 1.0, 1e-3])[:, None, None] for x in batches()]
    fit_basis(model, loud, model)
    layer = model.base_model.model.conv
    # U is the output direction that the one loud channel drives, and V what drives that output.
    driven = torch.linalg.svd(layer.get_base_layer().weight[:, 1].flatten(1)).U[:, 0]
    U, V = layer.nora_outer_B["default"][:, 0], layer.nora_outer_A["default"][0]
    assert (U @ driven).abs() > 0.99
    drivers = U @ layer.base_matrix()
    assert torch.allclose(V, drivers / drivers.norm(), atol=1e-5)


@pytest.mark.parametrize("basis", KINDS)
def test_other_adapters_and_their_scale_are_left_alone(basis):
    model = fitted("weight")
    model.add_adapter("data", NoraConfig(r=4, inner_r=2, basis=basis, target_modules=["inner"]))
    layers = [layer for _, layer in iter_nora_layers(model)]
    for layer in layers:
        perturb(layer)
    x = batches()[0]
    expected = model(x)
    fit_basis(model, batches(), loss_of(model), "data")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("basis", KINDS)
def test_peft_saves_fitted_factors_with_the_adapter(basis, tmp_path):
    model = fitted(basis)
    fit_basis(model, batches(), loss_of(model))
    for _, layer in iter_nora_layers(model):
        perturb(layer)
    x = batches()[0]
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Model(), tmp_path)
    assert torch.allclose(loaded(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: {"adapter_name": "other"}, "no NoRA adapter called 'other'"),
        (lambda model: {"batches": []}, "saw no data for 2 of 2 modules, e.g. .*conv"),
        (lambda model: {"step": lambda x: model.base_model.model.conv(x).mean()}, "1 of 2 modules"),
    ],
)
@pytest.mark.parametrize("basis", KINDS)
def test_what_cannot_be_fitted_is_refused(basis, change, message):
    model = fitted(basis)
    arguments = {"batches": batches(), "step": loss_of(model), **change(model)}
    with pytest.raises(ValueError, match=message):
        fit_basis(model, **arguments)
    assert not any(layer.disable_adapters for _, layer in iter_nora_layers(model))


def test_bases_of_the_weight_and_merged_models_are_refused():
    model = fitted("weight")
    with pytest.raises(ValueError, match="derived from the weights"):
        fit_basis(model, batches(), loss_of(model))
    model = fitted("gradient")
    fit_basis(model, batches(), loss_of(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        fit_basis(model, batches(), loss_of(model))
