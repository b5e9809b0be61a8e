"""The exported LoRA is the adapter, to rounding, in every layout and under all names."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nora_diffusion import load_pipeline
from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.keys import Dialect, diffusers_name, kohya_name, sgm_path
from nora_diffusion.adapter.lora import export_lora
from tests.tiny import (
    FAMILIES,
    adapt,
    adapted_modules,
    base_bytes,
    predict,
    text_encoder_names,
    tiny_pipeline,
    train,
)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def load_with_diffusers(pipe, path: Path) -> int:
    """What a user without this package does; returns how many modules diffusers adapted."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
    return sum(
        isinstance(module, LoraLayer) and "lora" in module.lora_A
        for name in ("unet", *text_encoder_names(pipe))
        for module in getattr(pipe, name).modules()
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
        out = export_lora(path, tmp_path / f"{layout}.safetensors", layout, base=clean)
        assert torch.equal(predict(clean), base)  # the pipeline lent to the export is untouched
        assert load_with_diffusers(clean, out) == count
        assert distance(predict(clean), expected) <= 1e-5
        clean.set_adapters("lora", 0.0)
        assert torch.equal(predict(clean), base)

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


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "module", "sd", "sdxl"),
    [
        (
            "unet",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            "unet",
            "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
            "lora_unet_up_blocks_1_attentions_2_transformer_blocks_1_ff_net_0_proj",
            "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
        ),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
            "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
        ),
        (
            "unet",
            "mid_block.resnets.1.conv2",
            "lora_unet_mid_block_resnets_1_conv2",
            "lora_unet_middle_block_2_out_layers_3",
        ),
        (
            "unet",
            "down_blocks.0.downsamplers.0.conv",
            "lora_unet_down_blocks_0_downsamplers_0_conv",
            "lora_unet_input_blocks_3_0_op",
        ),
        (
            "unet",
            "up_blocks.0.upsamplers.0.conv",
            "lora_unet_up_blocks_0_upsamplers_0_conv",
            "lora_unet_output_blocks_2_2_conv",
        ),
        (
            "unet",
            "down_blocks.1.resnets.0.conv_shortcut",
            "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
            "lora_unet_input_blocks_4_0_skip_connection",
        ),
        ("unet", "conv_in", "lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
        (
            "text_encoder",
            "encoder.layers.0.self_attn.q_proj",  # transformers 5: no text_model level
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "text_encoder",
            "text_model.encoder.layers.11.mlp.fc1",
            "lora_te_text_model_encoder_layers_11_mlp_fc1",
            "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        ),
    ],
)
def test_kohya_names(component, module, sd, sdxl):
    assert kohya_name(component, module, Dialect()) == sd
    assert kohya_name(component, module, Dialect(sdxl=True, layers_per_block=2)) == sdxl


def test_second_text_encoder_of_sdxl():
    dialect = Dialect(sdxl=True)
    module = "text_model.encoder.layers.31.self_attn.out_proj"
    name = "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"
    assert kohya_name("text_encoder_2", module, dialect) == name
    assert kohya_name("text_encoder_2", "text_projection", dialect) == "lora_te2_text_projection"


def test_diffusers_names_keep_the_text_model_level():
    module = "encoder.layers.0.self_attn.q_proj"
    assert diffusers_name("text_encoder", module) == f"text_encoder.text_model.{module}"
    assert diffusers_name("unet", "conv_in") == "unet.conv_in"


def test_sdxl_s_attention_lies_where_the_original_model_has_it():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    paths = {
        sgm_path(name, 2)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    depth: dict[str, set[str]] = {}
    for path in paths:
        block, found, rest = path.partition(".transformer_blocks.")
        if found:
            depth.setdefault(block, set()).add(rest.split(".")[0])
    assert {block: len(layers) for block, layers in depth.items()} == {
        "input_blocks.4.1": 2, "input_blocks.5.1": 2,
        "input_blocks.7.1": 10, "input_blocks.8.1": 10, "middle_block.1": 10,
        "output_blocks.0.1": 10, "output_blocks.1.1": 10, "output_blocks.2.1": 10,
        "output_blocks.3.1": 2, "output_blocks.4.1": 2, "output_blocks.5.1": 2,
    }  # fmt: skip
    assert {"time_embed.0", "label_emb.0.2", "out.2", "input_blocks.6.0.op"} <= paths
    linear = [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(paths) == len(linear)


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


# ---- PEFT layout ---------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("as_file", [False, True])
def test_peft_layout_loads_with_peft_alone(tmp_path, as_file):
    model = get_peft_model(gpt2(), NoraConfig(r=8, inner_r=2, target_modules=["c_attn", "c_fc"]))
    count = train(model, step=0.5)
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = tmp_path / "peft"
    target = out / "adapter_model.safetensors" if as_file else out
    assert export_lora(path, target, "peft", base=gpt2()) == target
    loaded = PeftModel.from_pretrained(gpt2(), out)
    assert sum(isinstance(m, LoraLayer) for m in loaded.modules()) == count
    assert distance(logits(loaded), logits(model)) <= 1e-5 < distance(logits(model), logits(gpt2()))
    ours = gpt2()
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


def test_lora_export_of_a_language_model_has_no_diffusers_layout(tmp_path):
    model = get_peft_model(gpt2(), NoraConfig(r=8, inner_r=2, target_modules=["c_attn"]))
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layout='peft'"):
        export_lora(path, tmp_path / "lora.safetensors", base=gpt2())


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
    with pytest.raises(AdapterFileError, match="not a native adapter"):
        export_lora(out, tmp_path / "again.safetensors", base=pipe)
    with pytest.raises(AdapterFileError, match="was trained on"):
        export_lora(path, tmp_path / "other.safetensors", base=tiny_pipeline(seed=1))
    assert not (tmp_path / "other.safetensors").exists()


def test_fully_trained_modules_do_not_fit_into_a_lora(tmp_path):
    config = {"r": 8, "inner_r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    model = get_peft_model(gpt2(), NoraConfig(**config))
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="ln_f.*cannot hold"):
        export_lora(path, tmp_path / "peft", "peft", base=gpt2())
