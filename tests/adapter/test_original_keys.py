"""Flux.1 adapters in kohya's layout, where query, key and value are one layer."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import load_adapter, save_adapter
from nora_diffusion.adapter.keys import Dialect
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.adapter.lora_file import encode, in_layout
from nora_diffusion.adapter.original_keys import fuse, original_layer, split
from tests.tiny import distance, train

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONTEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["net.0.proj", "net.2", "proj_mlp", "0.proj_out"]


def transformer(heads: int = 2, head: int = 16, double: int = 1, single: int = 1, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(head // 4, head // 2, head // 4),
            **config,
        ).eval()


def adapted(model, targets, init="orthogonal") -> int:
    model.add_adapter(NoraConfig(r=8, inner_r=2, target_modules=targets, init=init), "default")
    return train(model)


@torch.no_grad()
def answer(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    kwargs = {
        "hidden_states": torch.randn(1, 4, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 24, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    if model.config.guidance_embeds:
        kwargs["guidance"] = torch.ones(1)
    return model(**kwargs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("module", "layer", "count"),
    [
        ("transformer_blocks.3.attn.to_k", "double_blocks.3.img_attn.qkv", 3),
        ("transformer_blocks.18.attn.add_v_proj", "double_blocks.18.txt_attn.qkv", 3),
        ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", 1),
        ("transformer_blocks.0.ff_context.net.0.proj", "double_blocks.0.txt_mlp.0", 1),
        ("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", 1),
        ("single_transformer_blocks.37.attn.to_q", "single_blocks.37.linear1", 4),
        ("single_transformer_blocks.37.proj_out", "single_blocks.37.linear2", 1),
        ("single_transformer_blocks.0.norm.linear", "single_blocks.0.modulation.lin", 1),
        ("proj_out", "final_layer.linear", 1),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", 1),
    ],
)
def test_names_of_the_original_code(module, layer, count):
    found, parts = original_layer(module, "flux")
    assert found == layer and module in parts and len(parts) == count


def test_every_linear_layer_but_the_final_modulation_has_a_name():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    linear.remove("norm_out.linear")
    layers = dict(original_layer(name, "flux") for name in linear)
    assert sorted(part for parts in layers.values() for part in parts) == sorted(linear)
    assert len(layers) == 19 * 10 + 38 * 3 + 9
    with pytest.raises(ValueError, match="no name for 'norm_out.linear'.*diffusers"):
        original_layer("norm_out.linear", "flux")


def test_fused_factors_are_block_diagonal_and_come_apart_exactly():
    generator = torch.Generator().manual_seed(0)
    inside = "single_transformer_blocks.0."
    rows = {inside + part: 4 for part in ("attn.to_q", "attn.to_k", "attn.to_v")}
    rows[inside + "proj_mlp"] = 16
    pairs = {
        inside + part: (
            torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
        )
        for part in ("attn.to_q", "attn.to_v")
    }  # fmt: skip
    ((layer, (down, up)),) = fuse(pairs, rows, "flux").items()
    assert layer == "single_blocks.0.linear1"
    assert down.shape == (4, 4) and up.shape == (28, 4)
    whole = up @ down
    assert not whole[4:8].any() and not whole[12:].any()
    for first, part in ((0, "attn.to_q"), (8, "attn.to_v")):
        lora_A, lora_B = pairs[inside + part]
        torch.testing.assert_close(whole[first : first + 4], lora_B @ lora_A)
    back = split((down, up), original_layer(inside + "proj_mlp", "flux")[1], rows)
    assert back.keys() == pairs.keys()
    for part, pair in pairs.items():
        assert all(torch.equal(a, b) for a, b in zip(back[part], pair, strict=True))


def test_diffusers_converter_reads_a_whole_tiny_file(tmp_path):
    """All but single blocks, whose widths it fixes."""
    model = transformer(single=0)
    count = adapted(model, ATTENTION + CONTEXT + ["net.0.proj", "net.2"])
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = export_lora(path, tmp_path / "k.safetensors", "kohya", base=model)
    plain = transformer(single=0)
    converted = _convert_kohya_flux_lora_to_diffusers(load_file(out))
    plain.load_lora_adapter(converted, prefix="transformer")
    assert sum(isinstance(module, LoraLayer) for module in plain.modules()) == count == 12
    assert distance(answer(plain), answer(model)) <= 1e-5


@pytest.mark.parametrize("init", ["orthogonal", "sigma"])
@pytest.mark.parametrize(
    "targets",
    [ATTENTION + CONTEXT, ["to_q", "to_v"], ATTENTION + CONTEXT + FEED_FORWARD + ["x_embedder"]],
    ids=["attention", "two-of-three", "everything"],
)
def test_a_kohya_file_loads_to_the_same_answer(tmp_path, targets, init):
    model = transformer(guidance_embeds=True)
    count = adapted(model, targets, init)
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = export_lora(path, tmp_path / "k.safetensors", "kohya", base=model)
    tensors = load_file(out)
    assert all(name.startswith("lora_unet_") for name in tensors)
    rank = 2 if init == "orthogonal" else 4
    parts = sum(name in targets for name in ("to_q", "to_k", "to_v"))
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == rank * parts
    plain = transformer(guidance_embeds=True)
    assert load_adapter(plain, out) == count
    assert distance(answer(plain), answer(model)) <= 1e-5
    assert distance(answer(transformer(guidance_embeds=True)), answer(model)) > 1e-3


def test_an_untrained_adapter_comes_back_from_a_kohya_file(tmp_path):
    model = transformer()
    model.add_adapter(NoraConfig(r=8, inner_r=2, target_modules=["to_q", "to_k"]), "default")
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = export_lora(path, tmp_path / "k.safetensors", "kohya", base=model)
    plain = transformer()
    load_adapter(plain, out)
    assert distance(answer(plain), answer(transformer())) <= 1e-6


def test_a_block_of_real_width_goes_through_diffusers_own_converter(tmp_path):
    """The widths of a single block are fixed there: 24 heads of 128, as in Flux.1."""
    with torch.device("meta"):
        model = transformer(heads=24, head=128, double=0)
    block = model.single_transformer_blocks[0].to_empty(device="cpu")
    with torch.no_grad():  # a drawn block would take seconds; these are its widths, which matter
        for parameter in block.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    targets = ["to_q", "to_k", "to_v", "proj_mlp", "proj_out"]
    config = NoraConfig(r=8, inner_r=2, target_modules=targets, basis="random", init="orthogonal")
    inject_adapter_in_model(config, block, "default")
    assert train(block) == 5
    pairs = {
        f"single_transformer_blocks.0.{name}": layer.lora_factors("default")
        for name, layer in iter_nora_layers(block)
    }
    dialect = Dialect(transformer="flux")
    layers = in_layout({"transformer": pairs}, {"transformer": model}, "kohya", dialect)
    tensors = encode(layers, "kohya", dialect, torch.float32)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": [8, 3072],
        "lora_unet_single_blocks_0_linear1.lora_up.weight": [3 * 3072 + 12288, 8],
        "lora_unet_single_blocks_0_linear1.alpha": [],
        "lora_unet_single_blocks_0_linear2.lora_down.weight": [2, 3072 + 12288],
        "lora_unet_single_blocks_0_linear2.lora_up.weight": [3072, 2],
        "lora_unet_single_blocks_0_linear2.alpha": [],
    }
    converted = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    straight = encode({"transformer": pairs}, "diffusers", Dialect(), torch.float32)
    assert converted.keys() == straight.keys() and len(straight) == 10
    for name, tensor in straight.items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("guidance", [True, False])
def test_metadata_names_the_architecture(tmp_path, guidance):
    model = transformer(guidance_embeds=guidance)
    adapted(model, ATTENTION)
    path = save_adapter(model, tmp_path / "a.safetensors")
    out = export_lora(path, tmp_path / "k.safetensors", "kohya", base=model)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    kind = "dev" if guidance else "schnell"
    assert metadata["modelspec.architecture"] == f"flux-1-{kind}/lora"
    assert metadata["ss_base_model_version"] == "flux1"
    assert metadata["ss_network_dim"] == "Dynamic"


def test_what_the_layout_cannot_name_is_refused(tmp_path):
    model = transformer()
    adapted(model, ["norm_out.linear"])
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="norm_out.linear"):
        export_lora(path, tmp_path / "k.safetensors", "kohya", base=model)
