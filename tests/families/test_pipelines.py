"""An adapter and its LoRA in the other pipelines of a family, with offloading and compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from peft.tuners.lora import LoraLayer
from PIL import Image

from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.denoiser_hooks import load_adapter
from tests.families.rows import ROWS, adapt, predict
from tests.tiny import distance

ROW = {row.config: row for row in ROWS}
OTHER_BASES = ("sd2", "sd35_medium", "flux_schnell")
"""Further bases of a family, tested in the long run alone."""
ONE_EACH = [name for name in ROW if name not in OTHER_BASES]
every_base = pytest.mark.parametrize("name", ROW)


@dataclass(frozen=True)
class Task:
    """A pipeline of diffusers and what it is given besides the prompt."""

    name: str
    config: str
    pipeline: str
    inputs: tuple[str, ...]


IMAGE, MASK = ("image",), ("image", "mask_image")
TASKS = [
    Task("img2img", "sd15", "StableDiffusionImg2ImgPipeline", IMAGE),
    Task("inpaint", "sd15", "StableDiffusionInpaintPipeline", MASK),
    Task("controlnet", "sd15", "StableDiffusionControlNetPipeline", ("control",)),
    Task("img2img", "sd2", "StableDiffusionImg2ImgPipeline", IMAGE),
    Task("inpaint", "sd2", "StableDiffusionInpaintPipeline", MASK),
    Task("img2img", "sdxl", "StableDiffusionXLImg2ImgPipeline", IMAGE),
    Task("inpaint", "sdxl", "StableDiffusionXLInpaintPipeline", MASK),
    Task("controlnet", "sdxl", "StableDiffusionXLControlNetPipeline", ("control",)),
    Task("img2img", "sd3", "StableDiffusion3Img2ImgPipeline", IMAGE),
    Task("inpaint", "sd3", "StableDiffusion3InpaintPipeline", MASK),
    Task("img2img", "sd35_medium", "StableDiffusion3Img2ImgPipeline", IMAGE),
    Task("inpaint", "sd35_medium", "StableDiffusion3InpaintPipeline", MASK),
    Task("img2img", "flux_dev", "FluxImg2ImgPipeline", IMAGE),
    Task("inpaint", "flux_dev", "FluxInpaintPipeline", MASK),
    Task("img2img", "flux_schnell", "FluxImg2ImgPipeline", IMAGE),
    Task("inpaint", "flux_schnell", "FluxInpaintPipeline", MASK),
    # A picture in place of noise is what its plain pipeline is given, and has no strength.
    Task("img2img", "flux2_klein_base_4b", "Flux2KleinPipeline", IMAGE),
    Task("inpaint", "flux2_klein_base_4b", "Flux2KleinInpaintPipeline", MASK),
    Task("img2img", "z_image", "ZImageImg2ImgPipeline", IMAGE),
    Task("inpaint", "z_image", "ZImageInpaintPipeline", MASK),
]
NONE = {"pixart_sigma": "PixArt", "sana": "Sana"}
"""Families without such pipelines in diffusers, and how its names of them begin."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """By config: an adapter of the denoiser as a native file and as a LoRA (PEFT's for PixArt)."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def of(name: str) -> tuple[Path, Path]:
        row = ROW[name]
        family = row.load()
        adapt(row, family, text=False)
        pipe = family.components.pipeline
        native = save_adapter(pipe, folder / name / "adapter.safetensors")
        layout = "diffusers" if hasattr(pipe, "load_lora_weights") else "peft"
        return native, export_lora(native, folder / name / "lora.safetensors", layout, row.build())

    return of


def side_px(pipe: Any, row: Any) -> int:
    return row.load(pipe).resolution_px


def pipeline(task: Task) -> Any:
    """The task's pipeline around a family's tiny base."""
    base = ROW[task.config].build()
    kind = getattr(diffusers, task.pipeline)
    parts = dict(base.components)
    if "control" in task.inputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # As many halvings as the tiny autoencoder has, which is one.
            control = ControlNetModel.from_unet(
                base.unet, conditioning_embedding_out_channels=(16, 32)
            )
            for parameter in control.parameters():  # its outputs start at zero
                parameter.data.add_(0.02 * torch.randn(parameter.shape))
        parts["controlnet"] = control.eval()
    if task.config in ("sd15", "sd2"):
        parts["requires_safety_checker"] = False
    if task.config == "sdxl":
        parts["add_watermarker"] = False
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, side: int, inputs: tuple[str, ...] = (), seed: int = 0) -> np.ndarray:
    """(H, W, 3) of a picture in [0, 1], not yet rounded to 8 bits."""
    edited = "image" in inputs and type(pipe).__name__ == "Flux2KleinPipeline"
    shape = (64, 64, 3) if edited else (side, side, 3)  # a picture to edit has its own size
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    picture = Image.fromarray(noise)
    half = Image.new("L", (side, side))
    half.paste(255, (0, 0, side // 2, side))
    given: dict[str, Any] = {"image": picture, "mask_image": half}
    known = {name: given[name] for name in inputs if name in given}
    if "control" in inputs:
        known["image"] = picture
    elif inputs and not edited:
        known["strength"] = 0.9
    if type(pipe).__name__.startswith(("PixArt", "Sana")):
        known["use_resolution_binning"] = False
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt="a photo of a toy", width=side, height=side, num_inference_steps=3,
        guidance_scale=3.0, generator=generator, output_type="np", **known,
    ).images[0]  # fmt: skip


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[pytest.mark.slow] if task.config in OTHER_BASES else [])
        for task in TASKS
    ],
    ids=lambda task: f"{task.config}-{task.name}",
)
def test_the_same_adapter_works_in_another_pipeline_as_does_its_lora(task, files):
    row = ROW[task.config]
    native, lora = files(task.config)
    pipe = pipeline(task)
    side = side_px(row.build(), row)
    base = draw(pipe, side, task.inputs)
    assert far(base, draw(pipe, side, task.inputs, seed=1)) > 1e-2  # it draws what it is given
    assert load_adapter(pipe, native) == row.modules
    adapted = draw(pipe, side, task.inputs)
    assert far(adapted, base) > 1e-3

    clean = pipeline(task)
    clean.load_lora_weights(str(lora.parent), weight_name=lora.name)
    parts = [part for part in clean.components.values() if isinstance(part, torch.nn.Module)]
    layers = [m for part in parts for m in part.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == row.modules
    assert far(draw(clean, side, task.inputs), adapted) <= 1e-4


@pytest.mark.parametrize("start", NONE.values())
def test_diffusers_has_no_such_pipeline_of_a_family_yet(start):
    names = [name for name in dir(diffusers) if name.startswith(start) and "Sprint" not in name]
    assert names and not any("Img2Img" in name or "Inpaint" in name for name in names)


@pytest.mark.parametrize("task", [task for task in TASKS if task.name == "controlnet"])
def test_the_control_net_counts_beside_an_adapter(task, files):
    pipe = pipeline(task)
    load_adapter(pipe, files(task.config)[0])
    side = side_px(ROW[task.config].build(), ROW[task.config])
    controlled = draw(pipe, side, task.inputs)
    for parameter in pipe.controlnet.parameters():
        parameter.data.zero_()
    assert far(draw(pipe, side, task.inputs), controlled) > 1e-3


# ---- offloading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"), [("sd15", "adapter"), *((name, "offload") for name in ONE_EACH)]
)
def test_an_adapter_works_under_the_hooks_of_model_offload(name, first, files):
    """diffusers permits the CPU as the device that models move to; GPUs have the test below."""
    row, native = ROW[name], files(name)[0]
    plain = row.build()
    side = side_px(plain, row)
    base = draw(plain, side)
    load_adapter(plain, native)
    expected = draw(plain, side)
    pipe = row.build()
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    assert load_adapter(pipe, native) == row.modules
    if first == "adapter":
        pipe.enable_model_cpu_offload(device="cpu")
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert hasattr(denoiser, "_hf_hook")
    assert far(draw(pipe, side), expected) <= 1e-5
    assert far(expected, base) > 1e-3


@pytest.mark.gpu
@every_base
def test_an_adapter_moves_to_the_device_and_back_with_model_offload(name, files):
    row, native = ROW[name], files(name)[0]
    plain = row.build().to("cuda")
    side = row.load(row.build()).resolution_px
    load_adapter(plain, native)
    expected = draw(plain, side)
    pipe = row.build()
    load_adapter(pipe, native)
    pipe.enable_model_cpu_offload()
    assert far(draw(pipe, side), expected) <= 1e-3
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    devices = {tensor.device.type for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    assert devices == {"cpu"}


# ---- compiled ------------------------------------------------------------------------------------


def check_compiled(name: str, files: Any, backend: str) -> None:
    row, native = ROW[name], files(name)[0]
    family = row.load()
    parts = family.components
    base = predict(row, family)
    assert load_adapter(parts.pipeline, native) == row.modules
    expected = predict(row, family)
    torch._dynamo.reset()
    parts.denoiser.compile(backend=backend)
    try:
        compiled = predict(row, family)
        for _, layer in iter_nora_layers(parts.denoiser):
            layer.merge()
        merged = predict(row, family)
    finally:
        torch._dynamo.reset()
    assert distance(compiled, expected) <= 1e-4
    assert distance(merged, expected) <= 1e-4
    assert distance(expected, base) > 1e-3


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_denoiser_with_an_adapter_is_traced_to_the_same_answer(name, files):
    check_compiled(name, files, "eager")


@pytest.mark.slow
@every_base
def test_a_denoiser_with_an_adapter_compiles_to_the_same_answer(name, files):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")
    check_compiled(name, files, "inductor")
