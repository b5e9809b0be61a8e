"""The shipped model configs are those of the public checkpoints: their sizes are the published."""

import importlib
import json

import pytest
import torch

from nora_diffusion.families import ASSETS
from nora_diffusion.families.single_file import load_tokenizer

CLIP_L, CLIP_L_PROJECTED, CLIP_G = 123_060_480, 123_650_304, 694_659_840
T5_XXL = 4_762_310_656
GEMMA_2_2B = 2_614_341_888
VAE, VAE_16 = 83_653_863, 83_819_683
DC_AE = 312_250_275

SD3_ENCODERS = {
    "text_encoder": CLIP_L_PROJECTED,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
    "vae": VAE_16,
}

PARAMETERS = {
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "vae": VAE,
    },
    "sd3": {"transformer": 2_028_328_000, **SD3_ENCODERS},
    "sd35_medium": {"transformer": 2_243_171_520, **SD3_ENCODERS},
    "sd35_large": {"transformer": 8_056_627_520, **SD3_ENCODERS},
    "flux_dev": {
        "transformer": 11_901_408_320,
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
        "vae": VAE_16,
    },
    "flux_schnell": {"transformer": 11_891_178_560, "text_encoder": CLIP_L, "vae": VAE_16},
    "pixart_sigma": {"transformer": 610_856_096, "text_encoder": T5_XXL, "vae": VAE},
    # Sana 1.5 is Sana 1.0 (1,604,462,752) with four norms of 2,240 in each of its 20 layers.
    "sana": {"transformer": 1_604_641_952, "text_encoder": GEMMA_2_2B, "vae": DC_AE},
}
"""Parameters of each model in the public checkpoints."""


def size(folder, library: str, class_name: str) -> int:
    kind = getattr(importlib.import_module(library), class_name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        if library == "transformers":
            model = kind(kind.config_class(**config))
        else:
            model = kind.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configs_have_the_published_sizes(name):
    index = json.loads((ASSETS / "configs" / name / "model_index.json").read_text(encoding="utf-8"))
    sizes = {
        part: size(ASSETS / "configs" / name / part, *index[part]) for part in PARAMETERS[name]
    }
    assert sizes == PARAMETERS[name]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd35_medium", "sd35_large"])
def test_both_clip_tokenizers_give_the_published_ids(name):
    for part, padding in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = load_tokenizer(ASSETS / "configs" / name, part)
        ids = tokenizer("A photo of a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[padding] * 70]
