"""The shipped weights: loadable by plain diffusers, small, and what mini.json says they are."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from nora_diffusion.families import built_in_version
from nora_diffusion.mini.__main__ import PRESETS, SHIPPED
from nora_diffusion.mini.export import weights_hash


@pytest.fixture(scope="module", params=SHIPPED)
def folder(request: pytest.FixtureRequest) -> Path:
    return SHIPPED[request.param]


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_hash_is_that_of_the_weights(folder: Path):
    about = json.loads((folder / "mini.json").read_text(encoding="utf-8"))
    assert about["hash"] == weights_hash(folder)
    assert about["name"] == about["recipe"]["name"]
    assert built_in_version(folder.name) == {
        "base_version": about["name"], "base_hash": about["hash"]
    }  # fmt: skip


def test_mini_128_went_on_from_the_shipped_mini():
    about = json.loads((SHIPPED["gpu"] / "mini.json").read_text(encoding="utf-8"))
    assert about["recipe"]["start"]["hash"] == weights_hash(SHIPPED["cpu"])


def test_all_weights_together_are_at_most_30_mb(folder: Path):
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) <= 30_000_000


def test_plain_diffusers_draws_what_the_background_says(
    folder: Path, pipeline: StableDiffusionPipeline
):
    side = PRESETS["gpu" if folder == SHIPPED["gpu"] else "cpu"].size_px
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        image = pipeline(
            f"a photo of a dog on a {colour} background",
            num_inference_steps=12,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images[0]
        assert image.shape == (3, side, side)
        border = torch.cat([image[:, :4].flatten(1), image[:, -4:].flatten(1)], dim=1).mean(1)
        assert border.argmax() == channel


def test_decoding_a_picture_gives_it_back(pipeline: StableDiffusionPipeline):
    ramp = torch.linspace(-0.8, 0.8, 64).expand(1, 3, 64, 64)
    output = pipeline.vae.decode(pipeline.vae.encode(ramp).latents).sample
    assert (output - ramp).square().mean() < 0.01
