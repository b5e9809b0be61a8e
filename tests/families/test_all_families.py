"""What holds for every family, on tiny models made from its shipped configs: a row a family."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import PeftModel
from peft.mapping import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nora_diffusion import adapter_info, cli
from nora_diffusion.adapter import NoraConfig
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.config import UserError, load_config, shipped_configs
from nora_diffusion.denoiser_hooks import load_adapter
from nora_diffusion.events import read_events
from nora_diffusion.families import detect_family, load_family
from nora_diffusion.families.base import Framing
from nora_diffusion.families.objective import LossOptions
from tests.families.rows import CPU, PROMPTS, ROWS, adapt, batch, predict, published_loss
from tests.tiny import distance

every_family = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)


@cache
def saved(config: str, folder: Path) -> Path:
    """The tiny base of a row as a diffusers folder."""
    row = next(row for row in ROWS if row.config == config)
    row.build().save_pretrained(folder / config)
    return folder / config


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


# ---- loss ----------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_the_loss_is_that_of_the_published_equations(row):
    family = row.load()
    latents, given = batch(row, family)
    for seed in (0, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        loss = family.loss(family.components.denoiser, latents, given, generator)
        expected = published_loss(row, family, latents, given, seed).float()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@every_family
def test_a_size_that_is_no_whole_number_of_patches_is_refused_by_its_key(row):
    family = row.load()
    if family.components.denoiser_name == "unet":
        pytest.skip("has no patches")
    side = 4 * family.size_multiple_px + family.size_multiple_px // 2
    with pytest.raises(UserError, match=r"data\.resolution_px: .*patches of"):
        family.encode_images(torch.zeros(1, 3, side, side))


def test_positions_that_a_base_does_not_know_are_refused():
    family = next(row for row in ROWS if row.config == "sd35_medium").load()
    most = family.components.denoiser.config.pos_embed_max_size * family.size_multiple_px
    side = most + family.size_multiple_px
    with pytest.raises(UserError, match=f"positions up to {most} px"):
        family.encode_images(torch.zeros(1, 3, side, side))


@every_family
@torch.no_grad()
def test_a_reference_is_the_target_and_a_mask_takes_places_out(row):
    family = row.load()
    latents, given = batch(row, family, 2)
    denoiser = family.components.denoiser

    def loss(**options):
        generator = torch.Generator().manual_seed(1)
        return family.loss(denoiser, latents, given, generator, **options)

    assert torch.equal(loss(reference=(denoiser, given)), torch.zeros(2))
    whole = torch.ones(2, 1, *row.latents[1:])
    half = whole.clone()
    half[..., : row.latents[2] // 2] = 0
    torch.testing.assert_close(loss(mask=whole), loss())
    torch.testing.assert_close(loss(mask=half) + loss(mask=1 - half), loss())


@every_family
def test_the_signal_to_noise_weight_is_for_diffusion_alone(row):
    family = row.load()
    latents, given = batch(row, family, 2)
    arguments = (family.components.denoiser, latents, given, torch.Generator().manual_seed(0))
    options = LossOptions(min_snr_gamma=5.0)
    if row.signal is not None:
        assert torch.isfinite(family.loss(*arguments, options=options)).all()
        return
    with pytest.raises(UserError, match="train.min_snr_gamma = 5.*flow model"):
        family.loss(*arguments, options=options)


@every_family
def test_an_adapter_changes_nothing_at_first_and_training_lowers_the_loss(row):
    family = row.load()
    denoiser = family.components.denoiser
    latents, given = batch(row, family, 2)

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return family.loss(denoiser, latents, given, generator).mean()

    before = loss().item()
    config = NoraConfig(r=16, inner_r=8, target_modules=list(family.targets["attention"]))
    inject_adapter_in_model(config, denoiser)
    assert loss().item() == pytest.approx(before, rel=1e-5)
    optimizer = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.98 * before


# ---- pictures and prompts ------------------------------------------------------------------------


@every_family
def test_prompts_are_encoded_as_the_pipeline_does(row):
    family = row.load()
    with torch.no_grad():
        given = family.encode_prompts(PROMPTS)
        expected = row.encode(family.components.pipeline, PROMPTS)
    assert given.extra.keys() == expected.extra.keys()
    torch.testing.assert_close(given.prompt_embeds, expected.prompt_embeds, rtol=0, atol=0)
    for name, tensor in expected.extra.items():
        torch.testing.assert_close(given.extra[name], tensor, rtol=0, atol=0)


@every_family
def test_a_prompt_that_is_cut_is_said(row):
    family = row.load()
    with torch.no_grad(), pytest.warns(UserWarning, match="tokens cut to the"):
        family.encode_prompts(["x" * 700])


@every_family
def test_a_picture_depends_on_its_own_seed_alone_and_on_the_prompt(row):
    family = row.load()
    side = family.resolution_px

    def draw(seeds: list[int], prompt: str = PROMPTS[0]) -> list[Image.Image]:
        with torch.no_grad():
            given, negative = family.encode_prompts([prompt]), family.encode_prompts([""])
        return family.sample(
            given.repeat(len(seeds)), negative.repeat(len(seeds)), seeds,
            steps=2, guidance=3.0, width_px=side, height_px=side,
        )  # fmt: skip

    together, (alone,), (other,) = draw([7, 8]), draw([8]), draw([8], PROMPTS[1])
    assert alone.size == (side, side)
    pixels = [np.asarray(image, dtype=int) for image in (together[1], alone, together[0], other)]
    # The order of sums depends on the batch: a value may round to its neighbour.
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert np.abs(pixels[0] - pixels[2]).max() > 8
    assert np.abs(pixels[1] - pixels[3]).max() >= 1


@every_family
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_pictures_are_those_that_the_pipeline_draws_of_the_same_prompts(row, negative):
    family = row.load()
    side = family.resolution_px
    with torch.no_grad():
        given = family.encode_prompts(PROMPTS[:1])
        unwanted = family.encode_prompts([negative], negative=True)
    sizes = {"width": side, "height": side}
    (ours,) = family.sample(
        given, unwanted, [7], steps=3, guidance=4.0, width_px=side, height_px=side
    )
    told: dict[str, Any] = {"guidance_scale": 4.0, **sizes}
    if row.family == "z_image":  # its pipeline counts guidance from 0
        told["guidance_scale"] = 3.0
    if row.family in ("pixart", "sana"):
        told["use_resolution_binning"] = False
    pipe = row.build()
    if negative and row.family == "flux2_klein":
        told["negative_prompt_embeds"] = pipe.encode_prompt(negative)[0]
    elif negative and row.family != "flux":
        told["negative_prompt"] = negative
    (theirs,) = pipe(
        prompt=PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(7), **told
    ).images
    difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
    assert np.abs(difference).max() <= 1


@every_family
def test_images_are_encoded_to_scaled_latents_and_decode_back(row):
    family = row.load()
    vae = family.components.pipeline.vae
    side = family.resolution_px
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    assert latents.shape[1:] == row.latents
    with torch.no_grad():
        answer = vae.encode(pixels)
    raw = answer.latent_dist.mean if hasattr(answer, "latent_dist") else answer.latent
    if row.family == "flux2_klein":  # no scale of its own, but statistics of its patches
        patches = Flux2KleinPipeline._patchify_latents(raw)
        mean, variance = (
            statistic[:, None, None] for statistic in (vae.bn.running_mean, vae.bn.running_var)
        )
        expected = (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    else:
        expected = (raw - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)


# ---- files ---------------------------------------------------------------------------------------


def predict_loaded(jobs: str) -> None:
    """What a fresh process does with bases and adapters on disk (JSON: config, base, adapter)."""
    for config, base, adapter, out in json.loads(jobs):
        row = next(row for row in ROWS if row.config == config)
        family = load_family(base, dtype=torch.float32, device=CPU)
        plain = predict(row, family)
        load_adapter(family.components.pipeline, adapter)
        tensors = {"plain": plain, "adapted": predict(row, family)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


@pytest.fixture(scope="module")
def reloaded(bases) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each row the answers of this process, and of another one that loaded base and adapter."""
    jobs, here = [], {}
    for row in ROWS:
        base, adapter = saved(row.config, bases), bases / f"{row.config}-adapter.safetensors"
        family = row.load()
        plain = predict(row, family)
        adapt(row, family)
        here[row.config] = {"plain": plain, "adapted": predict(row, family)}
        save_adapter(family.components.pipeline, adapter)
        jobs.append([row.config, str(base), str(adapter), str(bases / f"{row.config}-out")])
    code = "import sys, tests.families.test_all_families as t; t.predict_loaded(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(jobs)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    return {config: (here[config], load_file(out)) for config, _, _, out in jobs}


@every_family
def test_base_and_adapter_load_in_a_fresh_process(row, reloaded):
    here, there = reloaded[row.config]
    assert distance(there["plain"], here["plain"]) <= 1e-5
    assert distance(there["adapted"], here["adapted"]) <= 1e-5
    assert distance(here["adapted"], here["plain"]) > 1e-3


def load_elsewhere(pipe: Any, native: Path, base: Any, folder: Path) -> int:
    """Export, and load as a user without this package does; returns how many modules have it."""
    if hasattr(pipe, "load_lora_weights"):
        out = export_lora(native, folder / "lora.safetensors", base=base)
        pipe.load_lora_weights(str(folder), weight_name=out.name)
    else:
        out = export_lora(native, folder / "peft", layout="peft", base=base)
        for path in out.iterdir():
            setattr(pipe, path.name, PeftModel.from_pretrained(getattr(pipe, path.name), str(path)))
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    return sum(isinstance(module, LoraLayer) for model in models for module in model.modules())


@every_family
@pytest.mark.parametrize("init", ["orthogonal", "sigma"])
def test_the_lora_export_loads_with_other_programs_loader(row, init, tmp_path):
    family = row.load()
    plain = predict(row, family)
    count = adapt(row, family, text=row.text_travels, init=init)
    native = save_adapter(family.components.pipeline, tmp_path / "adapter.safetensors")
    clean = row.load()
    assert load_elsewhere(clean.components.pipeline, native, row.build(), tmp_path) == count
    assert distance(predict(row, clean), predict(row, family)) <= 1e-4
    assert distance(predict(row, clean), plain) > 1e-3


@every_family
def test_every_other_file_loads_back(row, tmp_path):
    family = row.load()
    adapt(row, family, text=False)
    expected = predict(row, family)
    parts = family.components
    native = save_adapter(parts.pipeline, tmp_path / "native.safetensors")
    portable = save_adapter(parts.pipeline, tmp_path / "portable.safetensors", portable=True)
    lora = export_lora(native, tmp_path / "lora.safetensors", base=row.build())
    peft = export_lora(native, tmp_path / "peft", "peft", base=row.build())
    for file in (portable, lora, peft / "adapter_model.safetensors"):
        clean = row.load()
        assert load_adapter(clean.components.pipeline, file) == row.modules
        assert distance(predict(row, clean), expected) <= 1e-5
    clean = row.load()
    pipe, name = clean.components.pipeline, parts.denoiser_name
    setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), peft).base_model.model)
    layers = [m for m in clean.components.denoiser.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == row.modules
    assert distance(predict(row, clean), expected) <= 1e-5


ARCHITECTURES = {
    "sd15": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-3-m", "sd3"),
    "sd35_medium": ("stable-diffusion-3-5-medium", "sd3"),
    "flux_dev": ("flux-1-dev", "flux1"),
    "flux_schnell": ("flux-1-schnell", "flux1"),
    "flux2_klein_base_4b": ("flux-2-klein", "flux2_klein"),
    "z_image": ("z-image", "z_image"),
    "pixart_sigma": ("pixart-sigma", "pixart_sigma"),
    "sana": ("sana", "sana"),
}


@every_family
@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_an_export_says_what_it_is_in_every_layout(row, layout, tmp_path):
    family = row.load()
    adapt(row, family, text=False)
    pipe = family.components.pipeline
    if row.family == "sd":  # 1.x and 2.x are told apart by the widths of the real models
        width = {"sd15": 768, "sd2": 1024}[row.config]
        pipe.unet.register_to_config(cross_attention_dim=width)
    about = {"trigger": "sks", "class_name": "toy", "base": row.config, "steps": 5}
    native = save_adapter(pipe, tmp_path / "toy.safetensors", metadata=about)
    out = tmp_path / ("adapter_model.safetensors" if layout == "peft" else "lora.safetensors")
    if layout == "kohya" and row.family in ("flux2_klein", "z_image", "pixart", "sana"):
        with pytest.raises(ValueError, match="layout 'kohya' names the modules of.*diffusers"):
            export_lora(native, out, layout, base=pipe)
        return
    export_lora(native, out, layout, base=pipe)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    architecture, version = ARCHITECTURES[row.config]
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": out.stem,
        "modelspec.trigger_phrase": "sks",
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": row.config,
        "ss_steps": "5",
        "ss_tag_frequency": json.dumps({out.stem: {"sks toy": 1}}),
    }
    assert expected.items() <= metadata.items()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"]
    if row.signal is not None:
        assert metadata["modelspec.prediction_type"] == ("v" if row.velocity else "epsilon")


# ---- the commands --------------------------------------------------------------------------------


@every_family
def test_dreambooth_and_sample_end_to_end(row, bases, tmp_path, capsys):
    base, photos, run = saved(row.config, bases), tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    config = tmp_path / "config.toml"
    config.write_text(f"""
        model = {{ base = "{base}", device = "cpu" }}
        adapter = {{ r = 8, inner_r = 2 }}
        text_encoder = {{ train = {str(row.text_modules > 0).lower()}, r = 8, inner_r = 2 }}
        data = {{ subject = "{photos}", class_name = "toy", crop = "random", flip = true }}
        train = {{ steps = 3, batch_size = 2, prior = "base_prediction" }}
        sample = {{ n = 1, steps = 2, prompts = ["a {{trigger}} {{class_name}}"] }}
        output = {{ dir = "{run}" }}
    """)
    assert cli.main_dreambooth([str(config)]) == 0
    for name in ("adapter.safetensors", "pytorch_lora_weights.safetensors", "README.md"):
        assert (run / name).is_file()
    assert (run / "before_after.png").is_file() and (run / "samples" / "sheet.png").is_file()
    assert [event["event"] for event in read_events(run / "events.jsonl")][-1] == "done"
    info = adapter_info(run / "adapter.safetensors")
    modules = sum(part["modules"] for part in info["components"].values())
    assert (info["family"], modules) == (row.family, row.modules + row.text_modules)

    out = tmp_path / "pictures"
    options = ["--n", "1", "--steps", "2", "--out", str(out)]
    assert cli.main(["sample", str(run), "a {trigger}", *options]) == 0
    (picture,) = out.glob("*.png")
    assert Image.open(picture).size == (row.load().resolution_px,) * 2
    capsys.readouterr()


@every_family
def test_its_pipeline_is_recognised(row):
    assert detect_family(row.build()) == row.family


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_shipped_config_is_short_and_begins_with_its_launch_command(name):
    lines = shipped_configs()[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith(f"# nora-dreambooth {name} ")
    words = lines[0].removeprefix(f"# nora-dreambooth {name} ").split()
    assert load_config(name, words).data.class_name


@every_family
def test_pictures_that_are_no_squares_have_a_loss_and_a_mask(row):
    """Sides are multiples of what the family says; where the mask is 0, nothing counts."""
    family = row.load()
    side = family.size_multiple_px
    pixels = torch.rand(2, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0))
    latents = family.encode_images(pixels * 2 - 1)
    height, width = latents.shape[-2:]
    assert height * 3 == width * 2
    with torch.no_grad():
        given = family.encode_prompts(PROMPTS)
        square = (2 * side, 3 * side)
        given = family.frame(given, [Framing(square, (0, 0), square)] * 2)

        def loss(mask):
            generator = torch.Generator().manual_seed(1)
            return family.loss(family.components.denoiser, latents, given, generator, mask=mask)

        whole = torch.ones(2, 1, height, width)
        left, right = whole.clone(), whole.clone()
        left[..., width // 2 :], right[..., : width // 2] = 0, 0
        assert torch.isfinite(loss(None)).all() and torch.equal(loss(None), loss(whole))
        torch.testing.assert_close(loss(left) + loss(right), loss(None))
        assert not loss(0 * whole).any()
