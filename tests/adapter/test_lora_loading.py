"""LoRA exports in PEFT's layout, on bare models, and loading LoRA files of any origin."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from nora_diffusion.adapter import NoraConfig
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
    load_with_diffusers,
    logits,
    predict,
    tiny_gpt2,
    tiny_pipeline,
    train,
)


@pytest.mark.parametrize("as_file", [False, True])
def test_peft_layout_loads_with_peft_alone(tmp_path, as_file):
    model = get_peft_model(
        tiny_gpt2(), NoraConfig(r=8, inner_r=2, target_modules=["c_attn", "c_fc"])
    )
    count = train(model, step=0.5)
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = tmp_path / "peft"
    target = out / "adapter_model.safetensors" if as_file else out
    assert export_lora(path, target, "peft", base=tiny_gpt2()) == target
    loaded = PeftModel.from_pretrained(tiny_gpt2(), out)
    assert sum(isinstance(m, LoraLayer) for m in loaded.modules()) == count
    assert (
        distance(logits(loaded), logits(model))
        <= 1e-5
        < distance(logits(model), logits(tiny_gpt2()))
    )
    ours = tiny_gpt2()
    assert load_adapter(ours, target) == count
    assert distance(logits(ours), logits(model)) <= 1e-5


def test_peft_layout_of_a_pipeline_is_a_folder_a_component(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, everything=True)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give a folder"):
        export_lora(path, tmp_path / "adapter_model.safetensors", "peft", base=pipe)
    export_lora(path, tmp_path / "peft", "peft", base=pipe)
    clean = tiny_pipeline()
    clean.unet = PeftModel.from_pretrained(clean.unet, tmp_path / "peft" / "unet").base_model.model
    PeftModel.from_pretrained(clean.text_encoder, tmp_path / "peft" / "text_encoder")
    assert adapted_modules(clean) == count
    assert distance(predict(clean), predict(pipe)) <= 1e-5


def test_the_folder_of_several_components_is_one_adapter(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, text_encoders=True)
    about = {"base": "here", "trigger": "sks"}
    path = save_adapter(pipe, tmp_path / "a.safetensors", metadata=about)
    folder = export_lora(path, tmp_path / "peft", "peft", base=pipe)
    clean = tiny_pipeline()
    assert load_adapter(clean, folder) == count == adapted_modules(clean)
    assert distance(predict(clean), predict(pipe)) <= 1e-5
    whole, unet = adapter_info(folder), adapter_info(folder / "unet")
    assert set(whole["components"]) == {"unet", "text_encoder"} and whole["modules"] == count
    assert whole["trigger"] == "sks" and whole["config"] == unet["config"]
    assert whole["bytes"] > unet["bytes"] and whole["checksum"] != unet["checksum"]
    with pytest.raises(AdapterFileError, match="is a LoRA already"):
        export_lora(folder, tmp_path / "again.safetensors", base=pipe)


def test_a_folder_of_several_components_is_loaded_as_a_whole_or_not_at_all(tmp_path):
    def export(seed: int, scaling: float) -> Path:
        pipe = tiny_pipeline()
        adapt(pipe, seed=seed, scaling=scaling)
        path = save_adapter(pipe, tmp_path / f"{seed}.safetensors")
        return export_lora(path, tmp_path / str(seed), "peft", base=pipe)

    first, second = export(0, 1.0), export(1, 2.0)
    damaged = second / "unet" / "adapter_model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    clean = tiny_pipeline()
    modules = [name for name, _ in clean.unet.named_modules()]
    with pytest.raises(AdapterFileError, match="unet"):
        load_adapter(clean, second)
    damaged.write_bytes((first / "unet" / "adapter_model.safetensors").read_bytes())
    for look in (lambda: load_adapter(clean, second), lambda: adapter_info(second)):
        with pytest.raises(AdapterFileError, match="text_encoder, unet are not parts of one exp"):
            look()
    clean.unet.up_blocks = clean.unet.up_blocks[:0]  # so that unet, the last, does not fit
    modules = [name for name, _ in clean.unet.named_modules()]
    damaged.write_bytes(whole)
    with pytest.raises(AdapterFileError):
        load_adapter(clean, second)
    assert [name for name, _ in clean.unet.named_modules()] == modules
    assert adapted_modules(clean) == 0 and getattr(clean.text_encoder, "peft_config", None) is None


def test_lora_export_of_a_language_model_has_no_diffusers_layout(tmp_path):
    model = get_peft_model(tiny_gpt2(), NoraConfig(r=8, inner_r=2, target_modules=["c_attn"]))
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layout='peft'"):
        export_lora(path, tmp_path / "lora.safetensors", base=tiny_gpt2())


def test_bare_unet_exports_under_the_names_of_a_pipeline(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, text_encoders=False)
    path = save_adapter(pipe.unet, tmp_path / "a.safetensors")
    for layout in ("diffusers", "kohya"):
        clean = tiny_pipeline()
        out = export_lora(path, tmp_path / f"{layout}.safetensors", layout, base=clean.unet)
        assert load_with_diffusers(clean, out) == count
        assert distance(predict(clean), predict(pipe)) <= 1e-5


# ---- loading LoRA files --------------------------------------------------------------------------


def test_lora_and_nora_sum(tmp_path):
    files = []
    for seed in (1, 2):
        pipe = tiny_pipeline()
        adapt(pipe, seed=seed)
        files.append(save_adapter(pipe, tmp_path / f"{seed}.safetensors"))
    lora = export_lora(files[1], tmp_path / "lora.safetensors", base=tiny_pipeline())
    expected = tiny_pipeline()
    for index, path in enumerate(files):
        load_adapter(expected, path, f"n{index}")
    for order in ((files[0], lora), (lora, files[0])):
        mixed = tiny_pipeline()
        for index, path in enumerate(order):
            load_adapter(mixed, path, f"m{index}")
        assert distance(predict(mixed), predict(expected)) <= 1e-5
    assert distance(predict(expected), predict(tiny_pipeline())) > 0.05


def test_an_adapter_below_a_lora_is_saved_under_its_own_names(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, "nora", text_encoders=False)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    path = save_adapter(pipe, tmp_path / "a.safetensors", "nora")
    assert load_adapter(tiny_pipeline(), path) == count


def test_lora_of_another_program(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_k"]), "lora")
    for module in pipe.unet.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["lora"].weight.data.normal_(std=0.1)
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    weights = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(pipe.unet, adapter_name="lora")
    )
    pipe.save_lora_weights(
        tmp_path, weights, unet_lora_adapter_metadata=pipe.unet.peft_config["lora"].to_dict()
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    clean = tiny_pipeline()
    assert load_adapter(clean, path, "other") == adapted_modules(clean, "other") > 0
    assert distance(predict(clean), predict(pipe)) <= 1e-5
    assert distance(predict(pipe), predict(tiny_pipeline())) > 0.01
    with pytest.raises(AdapterFileError, match="pipelines only"):
        load_adapter(tiny_pipeline().unet, path)

    half_known = load_file(path)
    half_known["unet.no_such.to_k.lora_A.weight"] = torch.zeros(3, 32)
    half_known["unet.no_such.to_k.lora_B.weight"] = torch.zeros(32, 3)
    save_file(half_known, path)
    clean = tiny_pipeline()
    modules = [name for name, _ in clean.unet.named_modules()]
    with pytest.raises(AdapterFileError):
        load_adapter(clean, path, "other")
    assert [name for name, _ in clean.unet.named_modules()] == modules


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_exported_lora_on_another_kind_of_base_is_refused(tmp_path, layout):
    pipe = tiny_pipeline("sdxl")
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    out = export_lora(path, tmp_path / "lora.safetensors", layout, base=pipe)
    other = tiny_pipeline("sd15")
    with pytest.raises(AdapterFileError, match="lacks|belong to no module"):
        load_adapter(other, out)
    assert not any(isinstance(m, LoraLayer) for m in other.unet.modules())
    assert getattr(other.unet, "peft_config", None) is None


def test_arguments_are_checked(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layout='a1111'.*diffusers, kohya, peft"):
        export_lora(path, tmp_path / "lora.safetensors", "a1111", base=pipe)
    out = export_lora(path, tmp_path / "lora.safetensors", base=pipe)
    with pytest.raises(AdapterFileError, match="is a LoRA already.*adapter.safetensors of its run"):
        export_lora(out, tmp_path / "again.safetensors", base=pipe)
    with pytest.raises(AdapterFileError, match="was trained on"):
        export_lora(path, tmp_path / "other.safetensors", base=tiny_pipeline(seed=1))
    assert not (tmp_path / "other.safetensors").exists()


def test_fully_trained_modules_do_not_fit_into_a_lora(tmp_path):
    config = {"r": 8, "inner_r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    model = get_peft_model(tiny_gpt2(), NoraConfig(**config))
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="ln_f.*cannot hold"):
        export_lora(path, tmp_path / "peft", "peft", base=tiny_gpt2())
