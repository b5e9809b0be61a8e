"""Tiny random pipelines of Flux.1, Flux.2 klein and Z-Image, made as in ``tests.tiny_dit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from tests.tiny import tiny_text_encoder, tiny_tokenizer
from tests.tiny_dit import shipped, shrunk, t5_encoder, t5_tokenizer, tiny_vae

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's template as far as one message of a user goes."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level without merges, but for the words that mark a chat."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = 256 - len(printable)
    symbols = [chr(code) for code in (*printable, *range(256, 256 + moved))]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_config(family: str, tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    config = shipped(family, "text_encoder")
    config |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config |= {"max_window_layers": layers, "vocab_size": len(tokenizer)}
    config |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return Qwen3Config(**config)


def _scheduler(family: str) -> FlowMatchEulerDiscreteScheduler:
    return shrunk(FlowMatchEulerDiscreteScheduler, family, "scheduler")


def _flux(family: str) -> FluxPipeline:
    tokenizer, tokenizer_2 = tiny_tokenizer(), t5_tokenizer()
    transformer = shrunk(
        FluxTransformer2DModel, family, "transformer",
        num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return FluxPipeline(
        scheduler=_scheduler(family),
        vae=tiny_vae(family),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(family, "text_encoder_2", tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def _flux2_klein(family: str) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    vae = shrunk(
        AutoencoderKLFlux2, family, "vae",
        latent_channels=4, block_out_channels=[16, 16], layers_per_block=1, norm_num_groups=8,
        sample_size=16, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = shrunk(
        Flux2Transformer2DModel, family, "transformer",
        in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=3 * 16, timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=_scheduler(family),
        vae=vae.eval(),
        text_encoder=Qwen3ForCausalLM(qwen_config(family, tokenizer, 28)).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def _z_image(family: str) -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = shrunk(
        ZImageTransformer2DModel, family, "transformer",
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=_scheduler(family),
        vae=tiny_vae(family),
        text_encoder=Qwen3Model(qwen_config(family, tokenizer, 3)).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


TINY_FLOW: dict[str, Callable[[str], Any]] = {
    "flux_dev": _flux,
    "flux_schnell": _flux,
    "flux2_klein_base_4b": _flux2_klein,
    "z_image": _z_image,
}
"""Name of the shipped configs to the builder of a tiny pipeline."""


def tiny_flow(name: str, seed: int = 0) -> Any:
    """Pipeline made from the shipped configs of that name; same seed, same bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = TINY_FLOW[name](name)
        for parameter in pipe.transformer.parameters():  # no weight may stay at its zero start
            if parameter.ndim < 2:
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe
