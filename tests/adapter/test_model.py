"""NoRA inside models: every way to add it, degenerate weights, and life beside other adapters."""

import copy
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nora_diffusion.adapter import (
    NoraConfig,
    deferred_factors,
    derive_factors,
    factorise,
    iter_nora_layers,
)
from tests.adapter.toys import INITS, perturb
from tests.tiny import ATTENTION, EVERYTHING, base_bytes, tiny_unet

RANKS = {"r": 8, "inner_r": 4}


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(20, 16)
        self.second = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def nora(**fields):
    return NoraConfig(**{**RANKS, "target_modules": ["first", "second"], **fields})


def perturbed(model):
    for _, layer in iter_nora_layers(model):
        perturb(layer)
    return model


def batch():
    return torch.randn(7, 20, generator=torch.Generator().manual_seed(3))


def unet_input():
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 6, 32, generator=generator)
    return {"sample": latents, "timestep": torch.tensor([700, 30]), "encoder_hidden_states": text}


def unet():
    torch.manual_seed(0)
    return tiny_unet().requires_grad_(False)


# ---- ways to add it ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_a_diffusers_unet_is_unchanged_at_step_zero(init):
    model, inputs = unet(), unet_input()
    expected, before = model(**inputs).sample, base_bytes(model)
    model.add_adapter(nora(target_modules=EVERYTHING, init=init), "subject")
    kinds = {type(layer).__name__ for _, layer in iter_nora_layers(model)}
    assert kinds == {"Linear", "Conv2d"}
    assert torch.equal(model(**inputs).sample, expected)
    assert base_bytes(model) == before


def test_the_base_keeps_its_bytes_through_training_merging_and_deletion():
    model, inputs = unet(), unet_input()
    expected, before = model(**inputs).sample, base_bytes(model)
    model.add_adapter(nora(target_modules=ATTENTION), "subject")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 8 * 4 * len(dict(iter_nora_layers(model)))
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(**inputs).sample.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = model(**inputs).sample
    assert not torch.allclose(moved, expected, atol=1e-4)
    assert base_bytes(model) == before
    model.fuse_lora()
    assert base_bytes(model) != before
    assert torch.allclose(model(**inputs).sample, moved, atol=1e-5)
    model.unfuse_lora()
    assert base_bytes(model) == before
    model.disable_adapters()
    assert torch.equal(model(**inputs).sample, expected)
    model.enable_adapters()
    assert torch.equal(model(**inputs).sample, moved)
    model.delete_adapters("subject")
    assert base_bytes(model) == before


def test_diffusers_weights_and_scales_blend_adapters():
    model, inputs = unet(), unet_input()
    for name, seed in (("a", 0), ("b", 1)):
        model.add_adapter(nora(target_modules=["to_out.0"], seed=seed), name)
    perturbed(model)
    deltas = {
        name: {key: layer.get_delta_weight(name) for key, layer in iter_nora_layers(model)}
        for name in ("a", "b")
    }
    plain = unet()
    for key, module in plain.named_modules():
        if key in deltas["a"]:
            module.weight.data += 0.6 * deltas["a"][key] - 0.5 * deltas["b"][key]
    model.set_adapters(["a", "b"], [0.6, -0.5])
    blended = model(**inputs).sample
    assert torch.allclose(blended, plain(**inputs).sample, atol=1e-5)
    half = model(**inputs, cross_attention_kwargs={"scale": 0.5}).sample
    model.set_adapters(["a", "b"], [0.3, -0.25])
    assert torch.allclose(model(**inputs).sample, half, atol=1e-5)
    model.set_adapters(["a", "b"], [0.6, -0.5])
    assert torch.allclose(model(**inputs).sample, blended, atol=1e-6)
    off = model(**inputs, cross_attention_kwargs={"scale": 0.0}).sample
    assert torch.equal(off, unet()(**inputs).sample)


def test_gpt2_through_transformers_and_convert_to_lora():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model, tokens = GPT2LMHeadModel(config).eval(), torch.arange(10)[None]
    expected = model(tokens).logits
    model.add_adapter(nora(target_modules=["c_attn", "c_proj"]), "subject")
    assert torch.equal(model(tokens).logits, expected)
    perturbed(model)
    changed = model(tokens).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    lora_config, state = convert_to_lora(model, rank=4, adapter_name="subject")
    torch.manual_seed(0)
    other = inject_adapter_in_model(lora_config, GPT2LMHeadModel(config).eval())
    set_peft_model_state_dict(other, state)
    assert torch.allclose(other(tokens).logits, changed, atol=1e-4)


def test_all_linear_and_patterns_choose_modules_and_ranks():
    config = nora(
        target_modules="all-linear", rank_pattern={"first": 6}, inner_rank_pattern={".*second": 2}
    )
    model = get_peft_model(Net(), nora(target_modules=["first", "second", "head"]))
    assert len(dict(iter_nora_layers(model))) == 3
    config.target_modules = {"first", "second"}
    layers = dict(iter_nora_layers(get_peft_model(Net(), config).base_model.model))
    ranks = {name: (layer.r["default"], layer.inner_r["default"]) for name, layer in layers.items()}
    assert ranks == {"first": (6, 4), "second": (8, 2)}


@pytest.mark.parametrize("init", INITS)
def test_peft_saves_only_the_inner_pair_and_loads_the_same_function(init, tmp_path):
    model = perturbed(get_peft_model(Net(), nora(init=init)))
    names = {key.rsplit(".", 1)[-1] for key in get_peft_model_state_dict(model)}
    assert names == {"nora_inner_A", "nora_inner_B"}
    expected = model(batch())
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low)
        assert torch.allclose(loaded(batch()), expected, atol=1e-6)
        assert not torch.allclose(loaded(batch()), Net()(batch()), atol=1e-2)


@pytest.mark.parametrize("init", INITS)
def test_meta_adapters_are_filled_by_a_state_dict(init):
    source = perturbed(get_peft_model(Net(), nora(init=init)))
    model = inject_adapter_in_model(nora(init=init), Net(), low_cpu_mem_usage=True)
    assert {p.is_meta for n, p in model.named_parameters() if "nora" in n} == {True}
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(source).items()
    }
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert torch.allclose(model(batch()), source(batch()), atol=1e-6)


def test_a_base_on_the_meta_device_is_derived_when_its_weights_arrive():
    with torch.device("meta"):
        model = inject_adapter_in_model(nora(), Net())
    with pytest.raises(RuntimeError, match="load the base model's weights first"):
        next(iter_nora_layers(model))[1].derive_factors("default")
    weights = {
        key.replace("first.", "first.base_layer.").replace("second.", "second.base_layer."): value
        for key, value in Net().state_dict().items()
    }
    filled = get_peft_model_state_dict(get_peft_model(Net(), nora()))
    weights |= {
        key.removeprefix("base_model.model.") + ".default": value for key, value in filled.items()
    }
    model.load_state_dict(weights, strict=True, assign=True)
    assert torch.equal(model(batch()), Net()(batch()))
    perturbed(model)
    reference = perturbed(get_peft_model(Net(), nora()))
    assert torch.allclose(model(batch()), reference(batch()), atol=1e-6)


def test_deferred_factors_can_be_set_or_derived():
    with deferred_factors():
        model = get_peft_model(Net(), nora())
    layers = dict(iter_nora_layers(model.base_model.model))
    assert not any(layer.outer("default").derived for layer in layers.values())
    foreign = factorise(torch.randn(16, 20, generator=torch.Generator().manual_seed(9)), 8)
    layers["first"].set_factors("default", foreign)
    derive_factors(model, "default")
    assert torch.equal(layers["first"].nora_outer_A["default"], foreign.outer_A)
    assert layers["first"].outer("default").fingerprint == foreign.fingerprint
    own = layers["second"]
    assert own.outer("default").fingerprint == own.base_fingerprint()
    assert torch.equal(model(batch()), Net()(batch()))
    with pytest.raises(ValueError, match=r"outer_B of shape \(12, 8\), got \(16, 8\)"):
        own.set_factors("default", foreign)


def test_factors_from_a_file_do_not_disturb_adapters_of_the_present_weight():
    model = perturbed(get_peft_model(Net(), nora()))
    model.add_adapter("loaded", nora())
    model.add_adapter("again", nora())
    layer = model.base_model.model.first
    own = layer.nora_outer_A["default"]
    foreign = factorise(Net(seed=5).first.weight, 8)
    for name in ("loaded", "again"):
        layer.set_factors(name, foreign)
    assert layer.nora_outer_A["default"] is own
    assert torch.equal(layer.nora_outer_A["loaded"], foreign.outer_A)
    assert layer.nora_outer_A["loaded"].data_ptr() == layer.nora_outer_A["again"].data_ptr()
    model.add_adapter("new", nora())
    assert layer.nora_outer_A["new"].data_ptr() == own.data_ptr()


def test_a_casting_module_moves_the_adapter_along():
    model = perturbed(get_peft_model(Net(), nora(init="sigma")))
    expected = model(batch())
    assert torch.allclose(model.double()(batch().double()).float(), expected, atol=1e-5)
    assert torch.allclose(model.bfloat16()(batch().bfloat16()).float(), expected, atol=0.1)


# ---- degenerate weights --------------------------------------------------------------------------


def with_weight(weight):
    model = Net()
    with torch.no_grad():
        model.first.weight.copy_(weight)
    return model


@pytest.mark.parametrize("init", INITS)
def test_a_zero_weight_gets_a_seeded_basis_and_orthogonal_said_once(init):
    model = with_weight(torch.zeros(16, 20))
    with pytest.warns(UserWarning) as caught:
        adapted = get_peft_model(copy.deepcopy(model), nora(init=init))
    said = [str(w.message) for w in caught if "all zero" in str(w.message)]
    assert len(said) == 1 and "first" in said[0] and "init='orthogonal'" in said[0]
    assert torch.equal(adapted(batch()), model(batch()))
    adapted(batch()).square().sum().backward()
    layer = adapted.base_model.model.first
    assert "default" not in layer.nora_initial_A
    assert layer.nora_inner_B["default"].grad.norm() > 0
    again = get_peft_model(copy.deepcopy(model), nora(init=init)).base_model.model.first
    assert torch.equal(again.nora_outer_A["default"], layer.nora_outer_A["default"])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rank", [1, 6])
def test_a_rank_deficient_weight_still_trains_every_inner_dimension(init, rank):
    torch.manual_seed(0)
    model = with_weight(torch.randn(16, rank) @ torch.randn(rank, 20))
    adapted = get_peft_model(copy.deepcopy(model), nora(init=init))
    assert torch.equal(adapted(batch()), model(batch()))
    layer = adapted.base_model.model.first
    for _ in range(2):
        adapted(batch()).square().sum().backward()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad / p.grad.norm().clamp_min(1e-12)
    assert (layer.nora_inner_B["default"].grad.norm(dim=0) > 0).all()
    assert (layer.nora_inner_A["default"].grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_base_weight_is_an_error_that_names_the_module(value):
    weight = torch.randn(16, 20)
    weight[0, 0] = value
    with pytest.raises(ValueError, match="first: .*NaN or infinite.*exclude_modules"):
        get_peft_model(with_weight(weight), nora())


def test_ranks_above_the_weight_are_clamped_and_said_once():
    with pytest.warns(UserWarning) as caught:
        model = get_peft_model(Net(), nora(r=64, inner_r=14))
    said = [str(w.message) for w in caught if "lowered" in str(w.message)]
    assert len(said) == 1
    assert "lowered in 2 module(s)" in said[0] and "first (r=16, inner_r=14)" in said[0]
    layer = model.base_model.model.second
    assert layer.nora_inner_B["default"].shape == (12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Net(), nora(r=12, inner_r=12))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "'target' is a convolution with 2 groups.*exclude_modules"),
        (nn.Conv1d(4, 8, 3), "'target' is a Conv1d; NoRA adapts torch.nn.Linear"),
        (nn.Embedding(4, 8), "'target' is a Embedding"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(module, message):
    model = nn.ModuleDict({"target": module})
    with pytest.raises((TypeError, ValueError), match=message):
        inject_adapter_in_model(nora(target_modules=["target"]), model)


# ---- beside other adapters -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [("nora", "lora"), ("lora", "nora")])
def test_lora_and_nora_add_up_in_both_orders(order):
    model, inputs = unet(), unet_input()
    configs = {
        "nora": nora(target_modules=["to_q"], init_weights=False),
        "lora": LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False),
    }
    torch.manual_seed(1)
    for name in order:
        model.add_adapter(configs[name], name)
    model.set_adapters(list(order), [1.0, 1.0])
    expected = model(**inputs).sample
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    plain, deltas = unet(), {}
    for key, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = "nora" if hasattr(module, "nora_outer") else "lora"
            key = key.removesuffix(".base_layer")
            deltas[key] = deltas.get(key, 0) + module.get_delta_weight(name)
    assert len(layers) == 2 * len(deltas)
    for key, delta in deltas.items():
        plain.get_submodule(key).weight.data += delta
    assert torch.allclose(plain(**inputs).sample, expected, atol=1e-5)
    assert not torch.allclose(expected, unet()(**inputs).sample, atol=1e-3)


def test_biases_and_saved_modules_train_on_request():
    model = get_peft_model(Net(), nora(bias="nora_only", modules_to_save=["head"]))
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and "nora" not in name
    }
    assert {name.split("model.")[-1] for name in trained} == {
        "first.base_layer.bias",
        "second.base_layer.bias",
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }
