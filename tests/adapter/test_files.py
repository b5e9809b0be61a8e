"""Native files: what is loaded equals what was saved, on the right base, and never by half."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.components import restored
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.lora import export_lora
from tests.tiny import (
    ATTENTION,
    FAMILIES,
    adapt,
    adapted_modules,
    base_bytes,
    predict,
    text_encoder_names,
    tiny_pipeline,
    train,
)

ROOT = Path(__file__).parents[2]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def all_bytes(pipe) -> dict[str, dict[str, bytes]]:
    return {name: base_bytes(getattr(pipe, name)) for name in ("unet", *text_encoder_names(pipe))}


# ---- round trips ---------------------------------------------------------------------------------

IN_ANOTHER_PROCESS = """
import json, sys
import torch
from safetensors.torch import save_file
from nora_diffusion.adapter.files import load_adapter
from tests.tiny import predict, tiny_pipeline

outputs, counts = {}, {}
for family, path in json.loads(sys.argv[1]):
    pipe = tiny_pipeline(family)
    counts[path] = load_adapter(pipe, path)
    outputs[path] = predict(pipe)
save_file(outputs, sys.argv[2])
print(json.dumps(counts))
"""


def test_files_load_in_a_fresh_process_to_the_same_output(tmp_path):
    expected, jobs, modules = {}, [], {}
    for family in FAMILIES:
        pipe = tiny_pipeline(family)
        base = predict(pipe)
        count = adapt(pipe, everything=True, scaling=0.7, seed=3)
        for kind, options, tolerance in (
            ("compact", {}, 1e-5),
            ("portable", {"portable": True}, 1e-5),
            ("half", {"dtype": torch.float16}, 2e-3),
        )[: 3 if family == "sd15" else 1]:
            path = str(save_adapter(pipe, tmp_path / f"{family}-{kind}.safetensors", **options))
            expected[path] = (predict(pipe), tolerance)
            jobs.append((family, path))
            modules[path] = count
        assert distance(predict(pipe), base) > 0.05
    # No cache in common: the other process derives the outer factors on its own.
    env = os.environ | {"NORA_CACHE_DIR": "", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "outputs.safetensors"
    result = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, json.dumps(jobs), str(out)],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == modules
    outputs = load_file(out)
    for path, (output, tolerance) in expected.items():
        assert distance(outputs[path], output) <= tolerance, path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("portable", [False, True])
def test_a_16_bit_file_of_the_sigma_init_rounds_the_learnt_part_alone(tmp_path, dtype, portable):
    pipe = tiny_pipeline()
    base = predict(pipe)
    adapt(pipe, init="sigma")
    for component in (pipe.unet, pipe.text_encoder):
        for _, layer in iter_nora_layers(component):
            for inner, start in (
                (layer.nora_inner_A, layer.nora_initial_A),
                (layer.nora_inner_B, layer.nora_initial_B),
            ):
                # A short training: a thousandth of the way.
                inner["default"].data.copy_(start["default"].lerp(inner["default"].data, 1e-3))
    moved = distance(predict(pipe), base)
    path = save_adapter(pipe, tmp_path / "a.safetensors", portable=portable, dtype=dtype)
    again = tiny_pipeline()
    load_adapter(again, path)
    # Rounding P and Q themselves would cost as much as was learnt.
    assert distance(predict(again), predict(pipe)) < 0.05 * moved


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtype_is_the_one_asked_for_or_the_trained_one(tmp_path, dtype):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", dtype=dtype)
    assert {t.dtype for t in load_file(path).values()} == {dtype or torch.float32}


def test_float32_round_trip_is_exact_to_the_bit(tmp_path):
    pipe, again = tiny_pipeline(), tiny_pipeline()
    adapt(pipe, init="sigma")
    load_adapter(again, save_adapter(pipe, tmp_path / "a.safetensors"), "other")
    first, second = dict(iter_nora_layers(pipe.unet)), dict(iter_nora_layers(again.unet))
    assert first.keys() == second.keys() and first
    for name, layer in first.items():
        assert torch.equal(layer.nora_inner_A["default"], second[name].nora_inner_A["other"])
        assert torch.equal(layer.nora_inner_B["default"], second[name].nora_inner_B["other"])
    again_path = save_adapter(again, tmp_path / "b.safetensors", "other")
    assert again_path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_scale_weight_and_removal(tmp_path):
    pipe = tiny_pipeline()
    before = all_bytes(pipe)
    base = predict(pipe)
    adapt(pipe, "subject")
    path = save_adapter(pipe, tmp_path / "a.safetensors", "subject")
    pipe.set_adapters("subject", 0.5)
    half = predict(pipe)
    assert distance(half, base) > 0.01

    again = tiny_pipeline()
    assert load_adapter(again, path, "mine", weight=0.5) == adapted_modules(again, "mine") > 0
    assert distance(predict(again), half) <= 1e-5
    again.set_adapters("mine", 0.0)
    assert torch.equal(predict(again), base)
    again.set_adapters("mine", 1.0)
    again.disable_lora()
    assert torch.equal(predict(again), base)
    again.enable_lora()
    merged = predict(again)
    again.fuse_lora(components=["unet", "text_encoder"])
    assert distance(predict(again), merged) <= 1e-5
    again.unfuse_lora(components=["unet", "text_encoder"])
    assert all_bytes(again) == before
    again.delete_adapters("mine")
    assert torch.equal(predict(again), base)
    assert all_bytes(again) == before == all_bytes(pipe)


@torch.no_grad()
def test_two_loaded_adapters_sum_and_share_their_outer_factors(tmp_path):
    files = []
    for seed in (1, 2):
        pipe = tiny_pipeline()
        adapt(pipe, seed=seed)
        files.append(save_adapter(pipe, tmp_path / f"{seed}.safetensors"))
    both = tiny_pipeline()
    for index, (path, weight) in enumerate(zip(files, (1.0, 0.6), strict=True)):
        load_adapter(both, path, f"subject{index}", weight)
    # The same two updates written into the weights of a plain pipeline.
    plain = tiny_pipeline()
    for name in ("unet", "text_encoder"):
        weights = dict(getattr(plain, name).named_modules())
        for module, layer in iter_nora_layers(getattr(both, name)):
            assert layer.active_adapters == ["subject0", "subject1"]
            for side in (layer.nora_outer_A, layer.nora_outer_B):
                assert side["subject0"].data_ptr() == side["subject1"].data_ptr()
            for adapter in ("subject0", "subject1"):
                weights[module].weight += layer.get_delta_weight(adapter)
    assert distance(predict(both), predict(plain)) <= 1e-5
    assert distance(predict(both), predict(tiny_pipeline())) > 0.05
    both.set_adapters(["subject0", "subject1"], [0.0, 0.0])
    assert torch.equal(predict(both), predict(tiny_pipeline()))


def test_an_adapter_added_after_loading_shares_the_loaded_one_s_factors(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    again = tiny_pipeline()
    load_adapter(again, save_adapter(pipe, tmp_path / "a.safetensors"), "loaded")
    again.unet.add_adapter(NoraConfig(r=8, inner_r=2, target_modules=ATTENTION), "new")
    for _, layer in iter_nora_layers(again.unet):
        assert layer.nora_outer_A["new"].data_ptr() == layer.nora_outer_A["loaded"].data_ptr()


# ---- bare models ---------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(12)[None]).logits


def test_language_model_with_conv1d_plain_or_wrapped_by_peft(tmp_path):
    config = {"r": 8, "inner_r": 2, "target_modules": ["c_attn", "c_proj"]}
    base = logits(gpt2())
    wrapped = get_peft_model(gpt2(), NoraConfig(**config))
    count = train(wrapped, step=0.5)
    path = save_adapter(wrapped, tmp_path / "a.safetensors")
    assert set(load_file(path)) == {
        f"model.transformer.h.{i}.{module}.nora_inner_{side}"
        for i in range(2)
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        for side in "AB"
    }
    plain, other = gpt2(), get_peft_model(gpt2(), NoraConfig(**config), "first")
    assert load_adapter(plain, path) == count
    assert load_adapter(other, path, "second") == count
    other.set_adapter("second")
    assert distance(logits(plain), logits(wrapped)) <= 1e-5 < distance(logits(wrapped), base)
    assert distance(logits(other), logits(wrapped)) <= 1e-5


def test_a_bare_unet_s_file_fits_the_pipeline_and_the_reverse(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, text_encoders=False)
    from_unet = save_adapter(pipe.unet, tmp_path / "unet.safetensors")
    from_pipe = save_adapter(pipe, tmp_path / "pipe.safetensors")
    first, second = tiny_pipeline(), tiny_pipeline()
    assert load_adapter(first, from_unet) == load_adapter(second.unet, from_pipe) == count
    assert distance(predict(first), predict(pipe)) <= 1e-5
    assert distance(predict(second), predict(pipe)) <= 1e-5


def test_fully_trained_modules_travel_with_the_adapter(tmp_path):
    config = {"r": 8, "inner_r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    model = get_peft_model(gpt2(), NoraConfig(**config))
    train(model)
    model.base_model.model.transformer.ln_f.modules_to_save["default"].weight.data.mul_(1.5)
    again = gpt2()
    load_adapter(again, save_adapter(model, tmp_path / "a.safetensors"))
    assert distance(logits(again), logits(model)) <= 1e-5 < distance(logits(model), logits(gpt2()))


def test_trained_biases_are_refused(tmp_path):
    model = get_peft_model(
        gpt2(), NoraConfig(r=4, inner_r=2, target_modules=["c_attn"], bias="all")
    )
    with pytest.raises(ValueError, match="bias='all'"):
        save_adapter(model, tmp_path / "a.safetensors")


# ---- another base dtype --------------------------------------------------------------------------

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


# ---- sizes and description -----------------------------------------------------------------------


def test_sd15_attention_in_fp16_fits_340_kb(tmp_path):
    from diffusers import UNet2DConditionModel

    from nora_diffusion.adapter.native import Component, ModulePair, NativeAdapter, write_native

    with torch.device("meta"):  # the names of the real model, without its 860 M weights
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    names = [n for n, _ in unet.named_modules() if n.endswith(tuple(f".{t}" for t in ATTENTION))]
    assert len(names) == 128
    component = Component(
        config=NoraConfig(target_modules=ATTENTION),
        modules={
            n: ModulePair(torch.randn(8, 64).half(), torch.randn(64, 8).half()) for n in names
        },
        fingerprints={name: f"{index:064x}" for index, name in enumerate(names)},
        base_dtype="float16",
    )
    about = {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "trigger": "sks"}
    path = tmp_path / "a.safetensors"
    write_native(path, NativeAdapter({"unet": component}, False, about))
    payload = sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert payload == 262_144
    assert path.stat().st_size <= 340_000


def test_adapter_info_tells_what_was_saved(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, r=6, inner_r=3, scaling=0.5, timestep_rank={"alpha": 1.0, "k_min": 1})
    metadata = {
        "base": "tiny", "base_hash": "abc", "family": "sd", "trigger": "sks",
        "class_name": "toy", "steps": 300, "training": {"loss": 0.1},
    }  # fmt: skip
    path = save_adapter(pipe, tmp_path / "a.safetensors", metadata=metadata)
    info = adapter_info(path, base=tiny_pipeline())
    wanted = {
        "format_version": 1, "base": "tiny", "family": "sd", "trigger": "sks",
        "class_name": "toy", "steps": 300, "modules": count,
        "trainable_parameters": count * 2 * 6 * 3, "bytes": path.stat().st_size,
        "fingerprints_ok": True, "portable": False,
    }  # fmt: skip
    assert {key: info[key] for key in wanted} == wanted
    assert NoraConfig(**info["config"]) == pipe.unet.peft_config["default"]
    assert info["metadata"]["training"] == {"loss": 0.1}
    assert json.loads(json.dumps(info)) == info
    assert adapter_info(path)["fingerprints_ok"] is None
    assert adapter_info(path, base=tiny_pipeline(seed=1))["fingerprints_ok"] is False
    assert adapter_info(path, base=tiny_pipeline("sdxl"))["fingerprints_ok"] is False


def test_a_folder_stands_for_the_adapter_in_it(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe)
    save_adapter(pipe, tmp_path / "run" / "adapter.safetensors")
    assert load_adapter(tiny_pipeline(), tmp_path / "run") == count
    with pytest.raises(AdapterFileError, match=r"none of adapter\.safetensors"):
        load_adapter(tiny_pipeline(), tmp_path)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe = tiny_pipeline()
    adapt(pipe)
    return save_adapter(pipe, folder / "a.safetensors", metadata={"base": "tiny"})


def rewrite(path: Path, out: Path, edit) -> Path:
    """Apply `edit(tensors, header)` to a file and write it as this project would."""
    from nora_diffusion.adapter import header
    from nora_diffusion.adapter.native import HEADER_KEY

    contents = header.read(path)
    fields = json.loads(contents.metadata[HEADER_KEY])
    metadata = dict(contents.metadata)
    edit(contents.tensors, fields)
    metadata[HEADER_KEY] = json.dumps(fields)
    return header.write(out, contents.tensors, metadata)


def first(tensors: dict) -> str:
    return min(tensors)


def set_nan(tensors, _):
    tensors[first(tensors)][0, 0] = float("nan")


def set_infinity(tensors, _):
    tensors[first(tensors)][0, 0] = float("inf")


def drop_tensor(tensors, _):
    del tensors[first(tensors)]


def drop_module(tensors, fields):
    module = first(tensors).rpartition(".")[0]
    for side in "AB":
        del tensors[f"{module}.nora_inner_{side}"]


def foreign_tensor(tensors, _):
    tensors["unet.conv_in.weight"] = torch.zeros(2, 2)


def foreign_component(tensors, _):
    tensors["vae.decoder.nora_inner_A"] = torch.zeros(2, 8)


def wrong_shape(tensors, _):
    tensors[first(tensors)] = torch.zeros(3, 8)


def larger_rank(tensors, fields):
    fields["components"]["unet"]["config"]["r"] = 4


def integer_tensor(tensors, _):
    tensors[first(tensors)] = torch.zeros(2, 8, dtype=torch.int32)


def unknown_setting(_, fields):
    fields["components"]["unet"]["config"]["inner_rr"] = 2


def bad_setting(_, fields):
    fields["components"]["unet"]["config"]["dropout"] = 7


def unknown_module(tensors, fields):
    old = first(tensors).rpartition(".")[0]
    component, _, module = old.partition(".")
    prints = fields["components"][component]["fingerprints"]
    prints["no.such.module"] = prints.pop(module)
    for side in "AB":
        moved = tensors.pop(f"{old}.nora_inner_{side}")
        tensors[f"{component}.no.such.module.nora_inner_{side}"] = moved


def module_of_another_kind(tensors, fields):
    old = next(name for name in sorted(tensors) if name.startswith("unet")).rpartition(".")[0]
    prints = fields["components"]["unet"]["fingerprints"]
    prints["conv_norm_out"] = prints.pop(old.partition(".")[2])
    for side in "AB":
        tensors[f"unet.conv_norm_out.nora_inner_{side}"] = tensors.pop(f"{old}.nora_inner_{side}")


def second_text_encoder(tensors, fields):
    fields["components"]["text_encoder_2"] = fields["components"].pop("text_encoder")
    for name in list(tensors):
        if name.startswith("text_encoder."):
            tensors[name.replace("text_encoder.", "text_encoder_2.")] = tensors.pop(name)


EDITS = [
    (set_nan, "NaN"),
    (set_infinity, "NaN"),
    (drop_tensor, "missing"),
    (drop_module, "modules named in the header"),
    (foreign_tensor, "foreign tensor"),
    (foreign_component, "does not list"),
    (wrong_shape, "wrong shape"),
    (larger_rank, "wrong shape"),
    (integer_tensor, "integer"),
    (unknown_setting, "unknown field 'inner_rr'; upgrade"),
    (bad_setting, "dropout"),
    (unknown_module, "are not in this"),
    (module_of_another_kind, "GroupNorm"),
    (second_text_encoder, "'text_encoder_2', which this pipeline lacks"),
]


def state_of(pipe) -> dict:
    """Everything a load may touch."""
    state = {}
    for name in ("unet", *text_encoder_names(pipe)):
        model = getattr(pipe, name)
        state[name] = (
            [(n, type(m)) for n, m in model.named_modules()],
            [(n, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()],
            copy.copy(getattr(model, "peft_config", None)),
            getattr(model, "_hf_peft_config_loaded", None),
            [(n, m.active_adapters) for n, m in iter_nora_layers(model)],
        )
    return state


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=lambda v: getattr(v, "__name__", None))
def test_unusable_content_is_refused_and_nothing_changes(saved, tmp_path, edit, message):
    path = rewrite(saved, tmp_path / "a.safetensors", edit)
    pipe = tiny_pipeline()
    before = state_of(pipe)
    with pytest.raises(AdapterFileError, match=message) as refusal:
        load_adapter(pipe, path)
    assert str(path) in str(refusal.value)
    assert state_of(pipe) == before


def test_a_failed_second_load_leaves_the_first_adapter_as_it_was(saved, tmp_path):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "good", weight=0.8)
    pipe.unet.requires_grad_(False)
    before, output = state_of(pipe), predict(pipe)
    path = rewrite(saved, tmp_path / "a.safetensors", unknown_module)
    with pytest.raises(AdapterFileError):
        load_adapter(pipe, path, "bad")
    assert state_of(pipe) == before
    assert torch.equal(predict(pipe), output)


def test_a_failure_in_the_middle_is_undone_in_every_model(saved):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "good")
    before, output = state_of(pipe), predict(pipe)
    with pytest.raises(KeyboardInterrupt), restored([pipe.unet, pipe.text_encoder], "bad"):
        pipe.unet.add_adapter(NoraConfig(r=4, inner_r=2, target_modules=["conv1"]), "bad")
        pipe.unet.set_adapters(["good", "bad"], [0.5, 1.0])
        raise KeyboardInterrupt
    assert {k: v[:2] for k, v in state_of(pipe).items()} == {k: v[:2] for k, v in before.items()}
    assert state_of(pipe)["unet"][2:] == before["unet"][2:]
    pipe.set_adapters("good", 1.0)
    assert torch.equal(predict(pipe), output)


def test_another_base_is_refused(saved):
    other = tiny_pipeline(seed=1)
    before = state_of(other)
    with pytest.raises(AdapterFileError, match="other weights here.*was trained on tiny"):
        load_adapter(other, saved)
    assert state_of(other) == before
    with pytest.raises(AdapterFileError, match="another shape|are not in this"):
        load_adapter(tiny_pipeline("sdxl"), saved)


def test_a_base_with_a_single_changed_weight_is_refused(saved):
    pipe = tiny_pipeline()
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(AdapterFileError, match="1 of .* modules have other weights"):
        load_adapter(pipe, saved)


def test_portable_file_on_a_base_of_another_width_is_refused(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", portable=True)
    with pytest.raises(AdapterFileError, match="another shape"):
        load_adapter(tiny_pipeline("sd2"), path)


def test_a_newer_format_is_refused_with_advice(saved, tmp_path):
    from nora_diffusion.adapter import header
    from nora_diffusion.adapter.native import VERSION_KEY

    contents = header.read(saved)
    path = header.write(
        tmp_path / "a.safetensors", contents.tensors, {**contents.metadata, VERSION_KEY: "2"}
    )
    for use in (adapter_info, lambda path: load_adapter(tiny_pipeline(), path)):
        with pytest.raises(AdapterFileError, match="format 2.*reads up to 1.*pip install -U"):
            use(path)


def test_files_that_are_no_adapters_are_refused(tmp_path):
    pipe = tiny_pipeline()
    empty, text = tmp_path / "empty.safetensors", tmp_path / "text.safetensors"
    empty.write_bytes(b"")
    text.write_text("not a safetensors file at all")
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    pickled, plain = tmp_path / "weights.bin", tmp_path / "plain.safetensors"
    torch.save({"a": torch.zeros(2)}, pickled)
    save_file({"weight": torch.zeros(2, 2)}, plain)
    for path, message in (
        (tmp_path / "missing.safetensors", "no such file"),
        (empty, "too few"),
        (text, "not safetensors"),
        (huge, "not safetensors"),
        (pickled, "pickle.*safetensors"),
        (plain, "neither a native adapter nor a LoRA"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(pipe, path)
    with pytest.raises(AdapterFileError, match="not written by nora-diffusion"):
        adapter_info(plain)


def test_a_peft_folder_is_sent_to_peft(tmp_path):
    model = get_peft_model(gpt2(), NoraConfig(r=4, inner_r=2, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"PeftModel\.from_pretrained"):
        load_adapter(gpt2(), tmp_path)
    assert isinstance(PeftModel.from_pretrained(gpt2(), tmp_path), PeftModel)


def test_names_and_arguments_are_checked(saved, tmp_path):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "mine")
    with pytest.raises(ValueError, match="'mine' is in use.*adapter_name"):
        load_adapter(pipe, saved, "mine")
    with pytest.raises(ValueError, match="'yours'; adapters here: mine"):
        save_adapter(pipe, tmp_path / "a.safetensors", "yours")
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        save_adapter(pipe, tmp_path / "a.safetensors", "mine", dtype=torch.int8)
    with pytest.raises(TypeError, match="diffusers pipeline"):
        load_adapter({"unet": pipe.unet}, saved)


def test_nan_is_not_saved(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    _, layer = next(iter_nora_layers(pipe.unet))
    layer.nora_inner_A["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(pipe, tmp_path / "a.safetensors")
    layer.nora_inner_A["default"].data[0, 0] = 1e6
    with pytest.raises(ValueError, match="in torch.float16.*dtype=torch.float32"):
        save_adapter(pipe, tmp_path / "a.safetensors", dtype=torch.float16)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_an_interrupted_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved.read_bytes())

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(pipe, path)
    assert path.read_bytes() == saved.read_bytes()
    assert list(tmp_path.glob(".*")) == []
