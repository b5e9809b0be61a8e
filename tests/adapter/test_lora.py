"""The exported LoRA is the adapter, to rounding, in every layout and under all names."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nora_diffusion import load_pipeline
from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.lora import export_lora
from tests.tiny import (
    FAMILIES,
    adapt,
    adapted_modules,
    base_bytes,
    distance,
    load_with_diffusers,
    predict,
    text_encoder_names,
    tiny_pipeline,
)


@pytest.mark.parametrize(
    ("family", "init"),
    [
        ("mini", "orthogonal"), ("sd15", "orthogonal"), ("sd15", "sigma"),
        ("sd2", "orthogonal"), ("sdxl", "sigma"),
    ],
)  # fmt: skip
def test_every_route_to_the_adapted_model_gives_the_same_output(tmp_path, family, init):
    def plain():
        return load_pipeline("mini") if family == "mini" else tiny_pipeline(family)

    pipe = plain()
    base = predict(pipe)
    count = adapt(pipe, everything=True, init=init, scaling=1.3, seed=5)
    expected = predict(pipe)
    assert distance(expected, base) > 0.05

    path = save_adapter(pipe, tmp_path / "native.safetensors")
    components = ["unet", *text_encoder_names(pipe)]
    pipe.fuse_lora(components=components)
    assert distance(predict(pipe), expected) <= 1e-5
    pipe.unfuse_lora(components=components)

    for layout in ("diffusers", "kohya"):
        clean = plain()
        lent = base_bytes(clean.unet)
        out = export_lora(path, tmp_path / f"{layout}.safetensors", layout, base=clean)
        assert base_bytes(clean.unet) == lent  # the pipeline lent to the export is untouched
        assert distance(predict(clean), base) <= 1e-6
        assert load_with_diffusers(clean, out) == count
        assert distance(predict(clean), expected) <= 1e-5
        clean.set_adapters("lora", 0.0)
        assert distance(predict(clean), base) <= 1e-6

        ours = plain()
        assert load_adapter(ours, out, "ours") == adapted_modules(ours, "ours") == count
        assert distance(predict(ours), expected) <= 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_half_precision_export(tmp_path, layout):
    pipe = tiny_pipeline("sdxl")
    count = adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", dtype=torch.float16)
    clean = tiny_pipeline("sdxl")
    base = predict(clean)
    out = export_lora(path, tmp_path / "lora.safetensors", layout, base=clean)
    tensors = load_file(out)
    alphas = {name for name in tensors if name.endswith(".alpha")}
    assert {tensors[name].dtype for name in tensors.keys() - alphas} == {torch.float16}
    assert load_with_diffusers(clean, out) == count
    assert distance(predict(clean), predict(pipe)) <= 2e-3 < distance(predict(pipe), base)


def test_rank_is_k_without_initial_product_and_2k_with_it(tmp_path):
    for init, rank in (("orthogonal", 2), ("sigma", 4)):
        pipe = tiny_pipeline()
        adapt(pipe, init=init)
        path = save_adapter(pipe, tmp_path / f"{init}.safetensors")
        out = export_lora(path, tmp_path / "lora.safetensors", base=pipe)
        ranks = {t.shape[0] for name, t in load_file(out).items() if "lora_A" in name}
        assert ranks == {rank}


def test_mixed_ranks_are_filled_up_and_stay_exact(tmp_path):
    pipe = tiny_pipeline()
    count = adapt(pipe, everything=True, inner_rank_pattern={"to_k": 5, "q_proj": 1, "conv1": 3})
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    expected = predict(pipe)
    for layout in ("diffusers", "kohya"):
        clean = tiny_pipeline()
        out = export_lora(path, tmp_path / f"{layout}.safetensors", layout, base=clean)
        assert load_with_diffusers(clean, out) == count
        assert distance(predict(clean), expected) <= 1e-5


def test_export_is_taken_from_the_pipeline_that_still_has_the_adapter(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe, "subject")
    bytes_before, expected = base_bytes(pipe.unet), predict(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", "subject")
    out = export_lora(path, tmp_path / "lora.safetensors", base=pipe)
    assert torch.equal(predict(pipe), expected)
    assert pipe.get_active_adapters() == ["subject"]
    assert base_bytes(pipe.unet) == bytes_before
    pipe.fuse_lora(components=["unet", "text_encoder"])  # the weights now hold the update as well
    fused_bytes = base_bytes(pipe.unet)
    again = export_lora(path, tmp_path / "fused.safetensors", base=pipe)
    assert base_bytes(pipe.unet) == fused_bytes != bytes_before
    first, second = load_file(out), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_loads_a_named_base_in_the_dtype_of_training(tmp_path, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "base")
    count = adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    assert adapter_info(path, base=str(tmp_path / "base"))["fingerprints_ok"] is True
    out = export_lora(path, tmp_path / "lora.safetensors", base=str(tmp_path / "base"))
    assert load_with_diffusers(tiny_pipeline(), out) == count


def test_export_of_a_portable_file_needs_no_matching_weights(tmp_path):
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    count = adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", portable=True)
    clean = tiny_pipeline(seed=1)
    out = export_lora(path, tmp_path / "lora.safetensors", base=clean)
    assert load_with_diffusers(clean, out) == count


def test_export_on_another_dtype_relays_the_lora_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match="dtype=torch.bfloat16"):
        export_lora(path, tmp_path / "kohya.safetensors", "kohya", base=tiny_pipeline())
    export_lora(path, tmp_path / "pytorch_lora_weights.safetensors", base=pipe)
    direct = export_lora(path, tmp_path / "direct.safetensors", "kohya", base=pipe)
    relayed = export_lora(path, tmp_path / "kohya.safetensors", "kohya", base=tiny_pipeline())
    first, second = load_file(direct), load_file(relayed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is in the file -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_file_has_a_pair_and_an_alpha_for_every_module(tmp_path, family):
    pipe = tiny_pipeline(family)
    count = adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    tensors = load_file(export_lora(path, tmp_path / "k.safetensors", "kohya", base=pipe))
    names = {name.partition(".")[0] for name in tensors}
    assert len(names) == count and len(tensors) == 3 * count
    encoders = ("lora_te1_", "lora_te2_") if family == "sdxl" else ("lora_te_",)
    for prefix in encoders:
        level = f"{prefix}text_model_encoder_layers_"
        assert any(name.startswith(level) for name in names)
    assert all(name.startswith(("lora_unet_", *encoders)) for name in names)
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        # alpha / rank is the scale that A1111, ComfyUI and sd-scripts apply.
        assert tensors[f"{name}.alpha"].item() == down.shape[0] == up.shape[1]


def test_metadata_says_what_the_file_is(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    about = {"base": "tiny", "trigger": "sks", "class_name": "toy", "steps": 300}
    path = save_adapter(pipe, tmp_path / "a.safetensors", metadata=about)
    out = export_lora(path, tmp_path / "my_toy.safetensors", "kohya", base=pipe)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "my_toy"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert json.loads(metadata["ss_tag_frequency"]) == {"my_toy": {"sks toy": 1}}
    info = adapter_info(out)
    assert (info["kind"], info["base"], info["trigger"], info["steps"]) == (
        "lora", "tiny", "sks", 300,
    )  # fmt: skip
    assert info["modules"] == adapter_info(path)["modules"]
    assert info["config"]["r"] == 8


def test_export_under_a_timestep_law_is_taken_at_the_full_rank_and_says_so(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=1.0)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="full inner rank"):
        out = export_lora(path, tmp_path / "lora.safetensors", base=pipe)
    assert "full inner rank" in adapter_info(out)["metadata"]["note"]
    clean = tiny_pipeline()
    load_with_diffusers(clean, out)
    layers = dict(clean.unet.named_modules())
    for name, layer in iter_nora_layers(pipe.unet):
        update = layers[name].get_delta_weight("lora")
        assert distance(update, layer.get_delta_weight("default")) <= 1e-6


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_an_export_never_overwrites_the_adapter(tmp_path, layout):
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False)
    native = save_adapter(pipe, tmp_path / "adapter_model.safetensors")
    before = native.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(native)
    outs = [native, tmp_path / "link.safetensors", tmp_path / "." / native.name]
    outs += [tmp_path] if layout == "peft" else []
    for out in outs:
        with pytest.raises(ValueError, match="is the adapter itself"):
            export_lora(tmp_path, out, layout, base=pipe)
    assert native.read_bytes() == before


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False)
    native = save_adapter(pipe, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    for layout in ("diffusers", "kohya"):
        with pytest.raises(ValueError, match="is a folder; give a file name"):
            export_lora(native, tmp_path / "out", layout, base=pipe)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cure"), [("x.ckpt", "x"), ("x", "x"), ("v1.5", "v1.5"), ("x.safetensors.bak", None)]
)
def test_a_file_is_never_written_under_the_name_of_another_format(tmp_path, name, cure):
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False)
    native = save_adapter(pipe, tmp_path / "a.safetensors")
    told = "must end in .safetensors" + (f"; give .*/{cure}.safetensors$" if cure else "")
    for layout in ("diffusers", "kohya"):
        with pytest.raises(ValueError, match=told):
            export_lora(native, tmp_path / name, layout, base=pipe)
    assert not (tmp_path / name).exists()


def test_out_may_start_with_the_home_folder(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False)
    native = save_adapter(pipe, tmp_path / "a.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out = export_lora(native, "~/lora.safetensors", base=pipe)
    assert out == tmp_path / "home" / "lora.safetensors" and out.is_file()
