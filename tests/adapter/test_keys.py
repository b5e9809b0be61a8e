"""Names of modules in the layouts of other programs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from nora_diffusion.adapter.keys import Dialect, diffusers_name, kohya_name, sgm_path


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
