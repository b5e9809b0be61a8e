"""Merging: the same function merged and unmerged, and the base's bytes restored exactly."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig
from tests.adapter.toys import INITS, LAYERS, adapted, base_of, inner, input_for, perturb

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(layer):
    return layer.get_base_layer().weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_is_unmerged_and_the_bytes_come_back(kind, init, dtype):
    layer = perturb(adapted(base_of(kind).to(dtype), init=init))
    x, weight = input_for(kind).to(dtype), weight_of(layer)
    original, unmerged = weight.clone(), layer(x)
    pointer = weight.data_ptr()
    layer.merge()
    assert not torch.equal(weight_of(layer), original)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    assert torch.allclose(layer(x), unmerged, atol=tolerance, rtol=tolerance)
    layer.unmerge()
    assert torch.equal(weight_of(layer), original)
    assert weight_of(layer).data_ptr() == pointer
    assert torch.equal(layer(x), unmerged)
    assert not layer.merged


def test_merging_at_step_zero_changes_nothing():
    for init in INITS:
        layer = adapted(base_of("linear"), init=init)
        original = weight_of(layer).clone()
        layer.merge()
        assert torch.allclose(weight_of(layer), original, atol=1e-6)


def pair_of_adapters():
    layer = adapted(base_of("linear"))
    config = NoraConfig(r=6, inner_r=2, init="sigma")
    layer.update_layer("second", config, config.r, config.inner_r)
    layer.derive_factors("second")
    return perturb(layer)


def test_merging_one_after_the_other_equals_both_active():
    layer, x = pair_of_adapters(), input_for("linear")
    original = weight_of(layer).clone()
    layer.set_adapter(["default", "second"])
    both = layer(x)
    layer.merge(adapter_names=["second"])
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(adapter_names=["default"], safe_merge=True)
    assert torch.allclose(layer(x), both, atol=1e-5)
    layer.unmerge()
    assert torch.equal(weight_of(layer), original)


def test_merging_twice_or_unmerging_nothing_only_warns():
    layer = perturb(adapted(base_of("linear")))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.merge()
    merged = weight_of(layer).clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(weight_of(layer), merged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_touches_nothing(value):
    layer = perturb(adapted(base_of("linear")))
    with torch.no_grad():
        inner(layer)[0][0, 0] = value
    original = weight_of(layer).clone()
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(weight_of(layer), original)
    assert not layer.merged


def test_disabling_while_merged_restores_the_base():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    original, expected = weight_of(layer).clone(), layer.get_base_layer()(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert torch.equal(weight_of(layer), original)


def test_an_adapter_added_while_another_is_merged_sees_the_original_weight():
    layer = perturb(adapted(base_of("linear")))
    fingerprint, before = layer.base_fingerprint(), layer.nora_outer_A["default"]
    layer.merge()
    assert layer.base_fingerprint() == fingerprint
    layer.update_layer("fresh", NoraConfig(r=8, seed=5), 8, 4)
    layer.derive_factors("fresh")
    assert layer.outer("fresh").fingerprint == fingerprint
    agreement = torch.linalg.svdvals(layer.nora_outer_A["fresh"] @ before.T)
    assert agreement.min() > 0.99


def test_a_timestep_law_merges_at_the_full_rank():
    layer, x = perturb(adapted(base_of("linear"), timestep_rank=1.0)), input_for("linear")
    full = layer(x)
    layer.set_progress(torch.ones(2))
    layer.merge()
    assert torch.allclose(layer(x), full, atol=1e-5)


@pytest.mark.parametrize("order", ["lora outside", "nora outside"])
@pytest.mark.parametrize("first_out", ["lora", "nora"])
def test_lora_and_nora_on_one_weight_merge_and_unmerge_in_any_order(order, first_out):
    """Restoring a copy would undo a LoRA that was merged before and unmerged in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
    original = model[0].weight.clone()
    configs = {
        "nora": NoraConfig(r=8, target_modules=["0"], init_weights=False),
        "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    }
    names = ["nora", "lora"] if order == "lora outside" else ["lora", "nora"]
    layers = {}
    for name in names:
        model = get_peft_model(model, configs[name]).base_model.model
        layers[name] = model[0]
    x = torch.randn(3, 24)
    expected = model(x)
    for name in names[::-1]:
        layers[name].merge()
    assert torch.allclose(model(x), expected, atol=1e-5)
    for name in (first_out, *(other for other in names if other != first_out)):
        layers[name].unmerge()
    assert torch.allclose(layers["nora"].get_base_layer().weight, original, atol=1e-6)


def test_a_merged_layer_can_be_copied_and_unmerged():
    layer = perturb(adapted(base_of("conv2d")))
    original = weight_of(layer).clone()
    layer.merge()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(weight_of(copied), original)
    assert layer.merged and not torch.equal(weight_of(layer), original)


def test_tied_weights_stay_tied():
    base = base_of("linear")
    other = nn.Linear(24, 16)
    other.weight = base.weight
    layer = perturb(adapted(base))
    layer.merge()
    assert torch.equal(other.weight, weight_of(layer))
    layer.unmerge()
    assert torch.equal(other.weight, weight_of(layer))
