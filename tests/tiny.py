"""Tiny random pipelines with the module names and block structure of the real models.

Every weight is drawn from a seed; nothing is downloaded. Channels are 32-64 and latents 8x8, so one
denoiser call takes some ten milliseconds, yet each name that a key map has to translate (both kinds
of attention block, resnets, samplers, time and text embeddings) is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from nora_diffusion.families import ASSETS

FAMILIES = ("sd15", "sd2", "sdxl")
LATENT_SIZE = 8
PROMPT = "a photo of a sks toy on the beach"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
PROJECTION = ["proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2"]
EVERYTHING = [*ATTENTION, *FEED_FORWARD, *CONVOLUTION, *PROJECTION]
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_EVERYTHING = [*TEXT_ATTENTION, "fc1", "fc2"]


def tiny_tokenizer(max_length: int = 32) -> CLIPTokenizer:
    """Byte-level CLIP tokenizer without merges: every prompt is spelt out letter by letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # The byte-to-unicode table of GPT-2: printable bytes stand for themselves, the others are
    # moved above U+0100 in order.
    moved = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(moved))]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def text_config(
    tokenizer: CLIPTokenizer, width: int, activation: str, projection: int
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def tiny_text_encoder(
    tokenizer: CLIPTokenizer, width: int = 32, activation: str = "quick_gelu"
) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer, width, activation, width)).eval()


def tiny_unet(family: str = "sd15") -> UNet2DConditionModel:
    """UNet of the family's block structure, 4 latent channels, 8x8."""
    common: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": 8,
    }
    if family == "sd15":
        shape: dict[str, Any] = {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        }
    elif family == "sd2":
        shape = {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": [2, 4],
            "cross_attention_dim": 48,
            "use_linear_projection": True,
        }
    elif family == "sdxl":
        shape = {
            **json.loads((ASSETS / "configs" / "sdxl" / "unet" / "config.json").read_text()),
            "block_out_channels": (32, 32, 64),
            "attention_head_dim": [2, 2, 4],
            "cross_attention_dim": 32 + 64,
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
    else:
        raise ValueError(f"family={family!r}: use one of {FAMILIES}")
    return UNet2DConditionModel.from_config({**shape, **common}).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=2 * LATENT_SIZE,
    ).eval()


def tiny_pipeline(
    family: str = "sd15", seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Pipeline of the family ("sd15", "sd2", "sdxl"); same seed, same bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        unet, vae = tiny_unet(family), tiny_vae()
        prediction = "v_prediction" if family == "sd2" else "epsilon"
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        )
        if family == "sdxl":
            # Wider than the first, as the real one: by that diffusers tells them apart in a file.
            second = text_config(tokenizer, 64, "gelu", 32)
            pipe: Any = StableDiffusionXLPipeline(
                vae=vae,
                text_encoder=tiny_text_encoder(tokenizer),
                text_encoder_2=CLIPTextModelWithProjection(second).eval(),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                unet=unet,
                scheduler=scheduler,
                add_watermarker=False,
            )
        else:
            width, activation = (48, "gelu") if family == "sd2" else (32, "quick_gelu")
            pipe = StableDiffusionPipeline(
                vae=vae,
                text_encoder=tiny_text_encoder(tokenizer, width, activation),
                tokenizer=tokenizer,
                unet=unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def text_encoder_names(pipe: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


@torch.no_grad()
def predict(pipe: Any, prompt: str = PROMPT, seed: int = 1) -> torch.Tensor:
    """One denoiser call on fixed noise under the encoded prompt, (2, 4, 8, 8) float32.

    It goes through every text encoder and the UNet, with another timestep for each sample.
    """
    dtype, generator = pipe.unet.dtype, torch.Generator().manual_seed(seed)
    size = pipe.unet.config.sample_size
    latents = torch.randn(2, pipe.unet.config.in_channels, size, size, generator=generator)
    timesteps = torch.tensor([801, 121])
    encoded = pipe.encode_prompt(
        prompt,
        device=torch.device("cpu"),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    conditioning: dict[str, Any] = {"encoder_hidden_states": encoded[0].expand(2, -1, -1)}
    if hasattr(pipe, "text_encoder_2"):
        time_ids = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=dtype).expand(2, -1)
        pooled = encoded[2].expand(2, -1)
        conditioning["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return pipe.unet(latents.to(dtype), timesteps, **conditioning).sample.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference between two outputs."""
    return (a - b).abs().max().item()


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers, width 32; its projections are transposed linear layers (`Conv1D`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
        return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a language model on a fixed text, (1, 12, V)."""
    return model(torch.arange(12)[None]).logits


def base_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """Raw bytes of every base parameter and buffer, named as if no adapter were there."""
    found: dict[str, bytes] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "nora_" in name or "lora_" in name:
            continue
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        found[name.replace(".base_layer.", ".")] = bytes(raw.numpy())
    return found


def adapt(
    pipe: Any,
    name: str = "default",
    seed: int = 0,
    everything: bool = False,
    text_encoders: bool = True,
    **config: Any,
) -> int:
    """Add a NoRA adapter with inner pairs as if trained: random steps away from their start.

    Args:
        everything: all linear and convolution layers, else attention alone.
        config: fields of `NoraConfig`; r=8, inner_r=2 where not given.

    Returns:
        Number of adapted modules.
    """
    from nora_diffusion.adapter import NoraConfig

    targets = {"unet": EVERYTHING if everything else ATTENTION}
    for encoder in text_encoder_names(pipe) if text_encoders else ():
        targets[encoder] = TEXT_EVERYTHING if everything else TEXT_ATTENTION
    fields = {"r": 8, "inner_r": 2, **config}
    for component, modules in targets.items():
        getattr(pipe, component).add_adapter(NoraConfig(target_modules=modules, **fields), name)
    return sum(train(getattr(pipe, component), name, seed) for component in targets)


@torch.no_grad()
def train(model: torch.nn.Module, name: str = "default", seed: int = 0, step: float = 0.2) -> int:
    """Move the inner pairs of an adapter by seeded noise; returns how many modules have it."""
    from nora_diffusion.adapter import iter_nora_layers

    generator = torch.Generator().manual_seed(seed)
    layers = [layer for _, layer in iter_nora_layers(model) if name in layer.nora_inner_A]
    for layer in layers:
        for inner in (layer.nora_inner_A[name], layer.nora_inner_B[name]):
            inner.add_(step * torch.randn(inner.shape, generator=generator))
    return len(layers)


def adapted_modules(pipe: Any, name: str = "default") -> int:
    """Number of modules in the denoiser and text encoders that have an adapter of this name."""
    return sum(
        name in getattr(module, "scaling", {})
        for component in ("unet", *text_encoder_names(pipe))
        for module in getattr(pipe, component).modules()
    )


def load_with_diffusers(pipe: Any, path: Path) -> int:
    """What a user without this package does; returns how many modules diffusers adapted."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
    return sum(
        isinstance(module, LoraLayer) and "lora" in module.lora_A
        for name in ("unet", *text_encoder_names(pipe))
        for module in getattr(pipe, name).modules()
    )
