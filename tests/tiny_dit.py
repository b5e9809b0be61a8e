"""Tiny random pipelines of transformer families, made from the shipped configs by shrinking them.

What is not about size (module names, norms, prediction type, shift of sigmas, ...) is as in the
public checkpoints. Every weight is drawn from a seed; nothing is downloaded.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from nora_diffusion.families import ASSETS
from nora_diffusion.families.sana import INSTRUCTION
from tests.tiny import text_config, tiny_tokenizer

CHARACTERS = [chr(code) for code in range(33, 127)]


def shipped(family: str, part: str) -> dict[str, Any]:
    """A config that comes with the package."""
    name = "scheduler_config" if part == "scheduler" else "config"
    return json.loads((ASSETS / "configs" / family / part / f"{name}.json").read_text())


def shrunk(kind: Any, family: str, part: str, **changes: Any) -> Any:
    """A model or scheduler of a shipped config with these fields changed."""
    return kind.from_config({**shipped(family, part), **changes})


def t5_tokenizer(max_length: int = 512) -> T5Tokenizer:
    """Spells every prompt out letter by letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = [*special, *((character, -3.0) for character in CHARACTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def t5_encoder(family: str, part: str, tokenizer: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    config = shipped(family, part)
    config |= {"d_model": width, "d_ff": 2 * width, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return T5EncoderModel(T5Config(**{**config, "vocab_size": len(tokenizer)})).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """Knows syllables of the instruction that Sana puts before every prompt."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, add_bos_token=True)
    return tokenizer.train_new_from_iterator([INSTRUCTION], vocab_size=400)


def tiny_vae(family: str) -> AutoencoderKL:
    """2x in place of the public 8x."""
    return shrunk(
        AutoencoderKL, family, "vae",
        block_out_channels=[16, 16], layers_per_block=1, norm_num_groups=8, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip


def _pixart_sigma() -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    transformer = shrunk(
        PixArtTransformer2DModel, "pixart_sigma", "transformer",
        num_layers=2, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        caption_channels=32, sample_size=8, interpolation_scale=1,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder("pixart_sigma", "text_encoder", tokenizer),
        vae=tiny_vae("pixart_sigma"),
        transformer=transformer.eval(),
        scheduler=shrunk(DPMSolverMultistepScheduler, "pixart_sigma", "scheduler"),
    )


def _sana() -> SanaPipeline:
    tokenizer = gemma_tokenizer()
    transformer = shrunk(
        SanaTransformer2DModel, "sana", "transformer",
        num_layers=2, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
        cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32, sample_size=16,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    vae = shrunk(
        AutoencoderDC, "sana", "vae",
        latent_channels=4, attention_head_dim=8,
        encoder_block_types=["ResBlock", "EfficientViTBlock"],
        decoder_block_types=["ResBlock", "EfficientViTBlock"],
        encoder_block_out_channels=[16, 16], decoder_block_out_channels=[16, 16],
        encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1],
        encoder_qkv_multiscales=[[], [5]], decoder_qkv_multiscales=[[], [5]],
    )  # fmt: skip
    config = shipped("sana", "text_encoder")
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(Gemma2Config(**{**config, "vocab_size": len(tokenizer)})).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=shrunk(DPMSolverMultistepScheduler, "sana", "scheduler"),
    )


def _sd3(name: str, **changes: Any) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_3 = tiny_tokenizer(), t5_tokenizer()
    transformer = shrunk(
        SD3Transformer2DModel, name, "transformer",
        num_layers=2, num_attention_heads=4, attention_head_dim=8, caption_projection_dim=32,
        joint_attention_dim=80, pooled_projection_dim=64, sample_size=8, pos_embed_max_size=8,
        **changes,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        text_encoder=clip_projected(tokenizer, "quick_gelu"),
        text_encoder_2=clip_projected(tokenizer, "gelu"),
        text_encoder_3=t5_encoder(name, "text_encoder_3", tokenizer_3, width=80),
        vae=tiny_vae(name),
        transformer=transformer.eval(),
        scheduler=shrunk(FlowMatchEulerDiscreteScheduler, name, "scheduler"),
    )


def clip_projected(tokenizer: Any, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(tokenizer, 32, activation, 32)).eval()


BUILDERS = {
    "pixart_sigma": _pixart_sigma,
    "sana": _sana,
    "sd3": partial(_sd3, "sd3"),
    "sd35_medium": partial(_sd3, "sd35_medium", dual_attention_layers=[0]),
}
"""Name of the shipped configs to the builder of a tiny pipeline."""


def tiny_dit(name: str, seed: int = 0) -> Any:
    """Pipeline made from the shipped configs of that name; same seed, same bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
