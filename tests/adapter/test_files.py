"""Native files: what is loaded equals what was saved, in any process and beside other adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from safetensors.torch import load_file

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from tests.tiny import (
    ATTENTION,
    FAMILIES,
    adapt,
    adapted_modules,
    base_bytes,
    distance,
    logits,
    predict,
    text_encoder_names,
    tiny_gpt2,
    tiny_pipeline,
    train,
)

ROOT = Path(__file__).parents[2]


def all_bytes(pipe) -> dict[str, dict[str, bytes]]:
    return {name: base_bytes(getattr(pipe, name)) for name in ("unet", *text_encoder_names(pipe))}


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


def test_language_model_with_conv1d_plain_or_wrapped_by_peft(tmp_path):
    config = {"r": 8, "inner_r": 2, "target_modules": ["c_attn", "c_proj"]}
    base = logits(tiny_gpt2())
    wrapped = get_peft_model(tiny_gpt2(), NoraConfig(**config))
    count = train(wrapped, step=0.5)
    path = save_adapter(wrapped, tmp_path / "a.safetensors")
    assert set(load_file(path)) == {
        f"model.transformer.h.{i}.{module}.nora_inner_{side}"
        for i in range(2)
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        for side in "AB"
    }
    plain, other = tiny_gpt2(), get_peft_model(tiny_gpt2(), NoraConfig(**config), "first")
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
    model = get_peft_model(tiny_gpt2(), NoraConfig(**config))
    train(model)
    model.base_model.model.transformer.ln_f.modules_to_save["default"].weight.data.mul_(1.5)
    again = tiny_gpt2()
    load_adapter(again, save_adapter(model, tmp_path / "a.safetensors"))
    assert (
        distance(logits(again), logits(model))
        <= 1e-5
        < distance(logits(model), logits(tiny_gpt2()))
    )


def test_trained_biases_are_refused(tmp_path):
    model = get_peft_model(
        tiny_gpt2(), NoraConfig(r=4, inner_r=2, target_modules=["c_attn"], bias="all")
    )
    with pytest.raises(ValueError, match="bias='all'"):
        save_adapter(model, tmp_path / "a.safetensors")


# ---- sizes and description -----------------------------------------------------------------------


def test_sd15_attention_in_fp16_fits_340_kb(tmp_path):

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
