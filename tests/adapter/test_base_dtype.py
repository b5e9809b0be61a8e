"""Compact files on weights other than those of training, and files that must be portable."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.lora import export_lora
from tests.tiny import (
    adapt,
    adapted_modules,
    distance,
    predict,
    tiny_pipeline,
    train,
)

DTYPES = [
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def trained_in(dtype: torch.dtype, path: Path):
    pipe = tiny_pipeline(dtype=dtype)
    count = adapt(pipe)
    return count, save_adapter(pipe, path, metadata={"base": "tiny"}), pipe


def assert_same_updates(pipe, other, name: str) -> None:
    """Every layer's update agrees to 16-bit rounding; wrong factors would be 100 % off."""
    for component in ("unet", "text_encoder"):
        layers = dict(getattr(other, component).named_modules())
        for module, layer in iter_nora_layers(getattr(pipe, component)):
            update = layer.get_delta_weight("default").float()
            found = layers[module].get_delta_weight(name).float()
            assert (found - update).norm() < 0.01 * update.norm()


@pytest.mark.parametrize(("trained", "present"), DTYPES)
def test_another_dtype_takes_cached_factors(tmp_path, trained, present):
    count, path, pipe = trained_in(trained, tmp_path / "a.safetensors")
    other = tiny_pipeline(dtype=trained).to(present)
    base = predict(other)
    assert (
        load_adapter(other, path)
        == count
        == sum(
            "default" in layer.nora_inner_A
            for name in ("unet", "text_encoder")
            for _, layer in iter_nora_layers(getattr(other, name))
        )
    )
    assert distance(predict(other), base) > 0.05
    assert_same_updates(pipe, other, "default")
    # Saved again it still names the weights that its factors come from.
    save_adapter(other, tmp_path / "b.safetensors")
    original = tiny_pipeline(dtype=trained)
    assert adapter_info(tmp_path / "b.safetensors", original)["fingerprints_ok"] is True


@pytest.mark.parametrize(("trained", "present"), DTYPES)
def test_another_dtype_without_cache_takes_the_lora_beside(tmp_path, monkeypatch, trained, present):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    count, path, pipe = trained_in(trained, tmp_path / "adapter.safetensors")
    export_lora(path, tmp_path / "pytorch_lora_weights.safetensors", base=pipe)
    other = tiny_pipeline(dtype=trained).to(present)
    base = predict(other)
    with pytest.warns(UserWarning, match=r"LoRA export pytorch_lora_weights\.safetensors"):
        assert load_adapter(other, path, "mine", weight=1.0) == count
    assert adapted_modules(other, "mine") == count
    assert distance(predict(other), base) > 0.05
    assert_same_updates(pipe, other, "mine")
    other.set_adapters("mine", 0.0)
    assert torch.equal(predict(other), base)


@pytest.mark.parametrize(("trained", "present"), DTYPES)
def test_another_dtype_with_neither_is_refused_with_both_cures(
    tmp_path, monkeypatch, trained, present
):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    _, path, pipe = trained_in(trained, tmp_path / "a.safetensors")
    other = tiny_pipeline(dtype=trained).to(present)
    base, modules = predict(other), [name for name, _ in other.unet.named_modules()]
    with pytest.raises(AdapterFileError) as refusal:
        load_adapter(other, path)
    for part in ("tiny", f"dtype={trained}", "portable=True", "export_lora"):
        assert part in str(refusal.value)
    assert [name for name, _ in other.unet.named_modules()] == modules
    assert torch.equal(predict(other), base)
    # The second cure works.
    portable = save_adapter(pipe, tmp_path / "p.safetensors", portable=True)
    assert load_adapter(other, portable) > 0
    assert distance(predict(other), base) > 0.05


@pytest.mark.parametrize("basis", ["weight", "weight_minor"])
@pytest.mark.parametrize("change", ["fine-tuned", "other"])
def test_cached_factors_do_not_let_a_file_onto_another_base(tmp_path, basis, change):
    pipe = tiny_pipeline()
    adapt(pipe, basis=basis)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    other = tiny_pipeline(seed=1 if change == "other" else 0)
    if change == "fine-tuned":
        torch.manual_seed(0)
        for weight in other.unet.parameters():
            weight.data += (
                0.03 * weight.data.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
            )
    with pytest.raises(AdapterFileError, match="other weights here"):
        load_adapter(other, path)
    rounded = tiny_pipeline(dtype=torch.bfloat16)
    assert load_adapter(rounded, path) > 0


def test_a_lora_of_another_adapter_beside_the_file_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    _, path, _ = trained_in(torch.bfloat16, tmp_path / "adapter.safetensors")
    stranger = tiny_pipeline()
    adapt(stranger, seed=9)
    native = save_adapter(stranger, tmp_path / "stranger.safetensors")
    export_lora(native, tmp_path / "pytorch_lora_weights.safetensors", base=stranger)
    with pytest.raises(AdapterFileError, match="other weights here"):
        load_adapter(tiny_pipeline(), path)


def test_another_base_of_the_same_dtype_is_refused_though_a_lora_lies_beside(tmp_path):
    _, path, pipe = trained_in(torch.float32, tmp_path / "adapter.safetensors")
    lora = export_lora(path, tmp_path / "pytorch_lora_weights.safetensors", base=pipe)
    other = tiny_pipeline(seed=1)
    with pytest.raises(AdapterFileError, match="Load it on that base.*load pytorch_lora.* by hand"):
        load_adapter(other, path)
    assert adapted_modules(other) == 0
    # One model of the pipeline is enough, whatever the dtype of the others.
    mixed = tiny_pipeline(seed=1)
    mixed.unet.to(torch.bfloat16)
    with pytest.raises(AdapterFileError, match="Load it on that base"):
        load_adapter(mixed, path)
    assert load_adapter(other, lora) > 0


# ---- files that must be portable -----------------------------------------------------------------


def test_quantised_base_is_saved_portable_by_itself(tmp_path, monkeypatch):
    from peft.utils.quantization_utils import QuantizationBackend

    class Int8Linear(nn.Module):
        def __init__(self, dense: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = dense.in_features, dense.out_features
            self.scale = dense.weight.detach().abs().max() / 127
            self.bias = dense.bias
            self.weight = nn.Parameter(
                (dense.weight / self.scale).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x):
            return x @ (self.weight.float() * self.scale).T + self.bias

    class Int8Backend(QuantizationBackend):
        layer_type, backend_name = "linear", "int8-test"

        def get_base_weight(self, base_layer):
            return base_layer.weight.float() * base_layer.scale

        def maybe_clone_base_result(self, result):
            return result

    def resolve(base_layer, **_):
        return Int8Backend() if isinstance(base_layer, Int8Linear) else None

    for module in ("state", "model"):
        monkeypatch.setattr(
            f"nora_diffusion.adapter.{module}.resolve_quantization_backend", resolve
        )

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))

    def quantised():
        return nn.Sequential(*(Int8Linear(m) if isinstance(m, nn.Linear) else m for m in model()))

    x = torch.linspace(-1, 1, 24)[None]
    trained = get_peft_model(quantised(), NoraConfig(r=8, inner_r=2, target_modules=["0", "2"]))
    train(trained)
    path = save_adapter(trained, tmp_path / "a.safetensors")
    assert adapter_info(path)["portable"] is True
    again, dense = quantised(), model()
    assert load_adapter(again, path) == load_adapter(dense, path) == 2
    assert distance(again(x), trained(x)) <= 1e-5
    assert distance(trained(x), quantised()(x)) > 0.05
    # On the weights before quantisation the same update applies.
    layers = dict(iter_nora_layers(again))
    for name, layer in iter_nora_layers(dense):
        update = layers[name].get_delta_weight("default")
        assert distance(layer.get_delta_weight("default"), update) <= 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_base_round_trip(tmp_path, bits):
    bnb = pytest.importorskip("bitsandbytes")

    def model():
        torch.manual_seed(0)
        dense = nn.Linear(64, 64, bias=False)
        if bits == 4:
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False)
        else:
            layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
        return nn.Sequential(layer.to("cpu"))

    x = torch.linspace(-1, 1, 64)[None]
    trained = get_peft_model(model(), NoraConfig(r=8, inner_r=2, target_modules=["0"]))
    train(trained)
    path = save_adapter(trained, tmp_path / "a.safetensors")
    info = adapter_info(path, base=model())
    assert info["portable"] is True and info["fingerprints_ok"] is True
    again = model()
    assert load_adapter(again, path) == 1
    assert distance(again(x), trained(x)) <= 1e-5 < distance(model()(x), trained(x))


def test_random_basis_is_derived_from_the_seed_alone(tmp_path):
    pipe, again = tiny_pipeline(), tiny_pipeline()
    adapt(pipe, basis="random", seed=4)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    assert adapter_info(path)["portable"] is False
    load_adapter(again, path)
    assert distance(predict(again), predict(pipe)) <= 1e-5
