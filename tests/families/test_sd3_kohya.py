"""SD 3 adapters in kohya's layout: the names that other programs read, and what they do with them.

ComfyUI reads, for every layer of the transformer's original code, ``lora_unet_`` and the layer's
name with underscores, and ``lora_te1_`` and ``lora_te2_`` for both CLIPs; sd-scripts writes the
same names. Neither is run here. What both do, adding ``alpha / rank * up @ down`` to the layer of
that name, is done to a checkpoint in the original layout, which diffusers then reads.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.adapter.files import load_adapter, save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.adapter.original_keys import original_layer
from tests.families.original import original_state
from tests.families.rows import ROWS, adapt, predict
from tests.tiny import distance, train

ROW = {row.config: row for row in ROWS}
BLOCK = {
    "x_block_attn_qkv", "x_block_attn_proj", "x_block_mlp_fc1", "x_block_mlp_fc2",
    "context_block_attn_qkv", "context_block_attn_proj", "context_block_mlp_fc1",
    "context_block_mlp_fc2",
}  # fmt: skip
LAST = {name for name in BLOCK if not name.startswith("context")} | {"context_block_attn_qkv"}
DUAL = {"x_block_attn2_qkv", "x_block_attn2_proj"}
CLIP = {f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")}


def names_of(config: str) -> set[str]:
    """Names other programs have for all attention and feed-forward layers of the tiny models."""
    first = BLOCK | (DUAL if config == "sd35_medium" else set())
    return {
        *(f"lora_unet_joint_blocks_0_{name}" for name in first),
        *(f"lora_unet_joint_blocks_1_{name}" for name in LAST),
        *(
            f"lora_te{encoder}_text_model_encoder_layers_{layer}_{name}"
            for encoder in (1, 2)
            for layer in (0, 1)
            for name in CLIP
        ),
    }


def merged(state: dict[str, Tensor], lora: dict[str, Tensor], prefix: str) -> int:
    """Add a kohya-style LoRA to the weights it names; returns how many."""
    by_name = {prefix + k.removesuffix(".weight").replace(".", "_"): k for k in state}
    names = {key.split(".")[0] for key in lora if key.startswith(prefix)}
    for name in names:
        down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
        scale = lora[f"{name}.alpha"].item() / down.shape[0]
        update = scale * up.flatten(1) @ down.flatten(1)
        weight = state[by_name[name]]
        state[by_name[name]] = weight + update.view(weight.shape)
    return len(names)


@pytest.mark.parametrize("init", ["orthogonal", "sigma"])
@pytest.mark.parametrize("config", ["sd3", "sd35_medium"])
@torch.no_grad()
def test_added_to_the_layers_it_names_it_is_the_adapter(config, init, tmp_path):
    row = ROW[config]
    family = row.load()
    base = predict(row, family)
    count = adapt(row, family, init=init)
    native = save_adapter(family.components.pipeline, tmp_path / "a.safetensors")
    lora = load_file(export_lora(native, tmp_path / "k.safetensors", "kohya", row.build()))
    names = {key.split(".")[0] for key in lora}
    assert names == {name for name in names_of(config) if "_mlp_" not in name}
    assert len(lora) == 3 * len(names)

    pipe = row.build()
    state = original_state(pipe.transformer)
    changed = merged(state, lora, "lora_unet_")
    pipe.transformer = SD3Transformer2DModel.from_single_file(
        state, config=saved_config(pipe, tmp_path), subfolder="transformer", local_files_only=True
    )
    for number, encoder in ((1, pipe.text_encoder), (2, pipe.text_encoder_2)):
        weights = encoder.state_dict()
        changed += merged(weights, lora, f"lora_te{number}_")
        encoder.load_state_dict(weights)
    assert changed == len(names)
    expected = predict(row, family)
    assert distance(predict(row, row.load(pipe)), expected) <= 1e-5
    assert distance(expected, base) > 1e-3

    again = row.load()
    assert load_adapter(again.components.pipeline, tmp_path / "k.safetensors") == count
    assert distance(predict(row, again), expected) <= 1e-5


def saved_config(pipe, folder) -> str:
    pipe.transformer.save_config(folder / "transformer")
    return str(folder)


@pytest.mark.parametrize("config", ["sd3", "sd35_medium"])
def test_feed_forward_layers_and_embedders_have_their_names(config):
    family = ROW[config].load()
    endings = [*family.targets["attention"], *family.targets["feed_forward"]]
    found = {
        "lora_unet_" + original_layer(name, "sd3")[0].replace(".", "_")
        for name, _ in family.components.denoiser.named_modules()
        if name.endswith(tuple(f".{ending}" for ending in endings))
    }
    assert found == {name for name in names_of(config) if name.startswith("lora_unet_")}
    for module, layer in {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "proj_out": "final_layer.linear",
        "transformer_blocks.3.norm1.linear": "joint_blocks.3.x_block.adaLN_modulation.1",
    }.items():
        assert original_layer(module, "sd3")[0] == layer


@pytest.mark.parametrize("module", ["norm_out.linear", "transformer_blocks.1.norm1_context.linear"])
def test_modulations_whose_rows_differ_have_no_name(module):
    with pytest.raises(ValueError, match=f"no name for '{module}', a module of SD 3"):
        original_layer(module, "sd3")


def test_the_patch_embedding_is_exported_as_the_convolution_it_is(tmp_path):
    model = ROW["sd3"].build().transformer
    config = NoraConfig(r=8, inner_r=2, target_modules=["pos_embed.proj"], init="orthogonal")
    model.add_adapter(config, "default")
    train(model)
    native = save_adapter(model, tmp_path / "a.safetensors")
    lora = load_file(export_lora(native, tmp_path / "k.safetensors", "kohya", model))
    assert lora["lora_unet_x_embedder_proj.lora_down.weight"].shape == (2, 16, 2, 2)
    assert lora["lora_unet_x_embedder_proj.lora_up.weight"].shape == (32, 2, 1, 1)


def test_diffusers_itself_takes_nothing_of_it(tmp_path):
    """Which is why the table above is needed, and load_adapter reads the file on its own."""
    row = ROW["sd3"]
    family = row.load()
    adapt(row, family, text=False)
    native = save_adapter(family.components.pipeline, tmp_path / "a.safetensors")
    export_lora(native, tmp_path / "k.safetensors", "kohya", row.build())
    pipe = row.build()
    pipe.load_lora_weights(str(tmp_path), weight_name="k.safetensors")
    assert not any(isinstance(module, LoraLayer) for module in pipe.transformer.modules())
