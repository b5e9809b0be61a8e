"""The Stable Diffusion family against the published equations, not against its own helpers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from nora_diffusion import NoraConfig, adapter_info, families, save_adapter
from nora_diffusion.config import UserError
from nora_diffusion.families import detect_family, load_family
from nora_diffusion.families.base import Conditioning
from nora_diffusion.families.objective import LossOptions
from nora_diffusion.families.sd import StableDiffusion
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")


def make_family(
    prediction_type="epsilon", dtype=torch.float32, num_train_timesteps=1000, **schedule
):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
        **schedule,
    )
    return StableDiffusion.from_pipeline(pipe, base="tiny", dtype=dtype, device=CPU)


def published_alphas_cumprod(steps: int, zero_terminal: bool) -> torch.Tensor:
    """Scaled-linear schedule of latent diffusion; Lin et al. 2023, algorithm 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    cumulated = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal:
        return cumulated
    root = cumulated.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def batch(size: int) -> tuple[torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(size, 4, 8, 8, generator=generator)
    return latents, Conditioning(torch.randn(size, 32, 32, generator=generator))


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal", "steps"),
    [
        ("epsilon", False, 1000),
        ("v_prediction", False, 1000),
        ("v_prediction", True, 1000),
        ("v_prediction", True, 3),  # so few that the batch holds the terminal step
        ("sample", False, 1000),
    ],
)
@torch.no_grad()
def test_loss_is_that_of_the_published_equations(prediction_type, zero_terminal, steps):
    family = make_family(
        prediction_type, num_train_timesteps=steps, rescale_betas_zero_snr=zero_terminal
    )
    latents, conditioning = batch(8)
    loss = family.loss(
        family.components.denoiser, latents, conditioning, torch.Generator().manual_seed(5)
    )

    generator = torch.Generator().manual_seed(5)
    timesteps = torch.randint(steps, (8,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    signal = published_alphas_cumprod(steps, zero_terminal)[timesteps].view(-1, 1, 1, 1).float()
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    answer = family.components.denoiser(noisy, timesteps, conditioning.prompt_embeds).sample
    target = {
        "epsilon": noise,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * latents,
        "sample": latents,
    }[prediction_type]
    expected = torch.stack([((a - t) ** 2).mean() for a, t in zip(answer, target, strict=True)])
    if zero_terminal and steps == 3:
        assert (timesteps == 2).any() and (signal[timesteps == 2] == 0).all()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_min_snr_scales_each_sample_by_its_own_weight():
    family = make_family()
    latents, conditioning = batch(8)
    plain, weighted = (
        family.loss(
            family.components.denoiser,
            latents,
            conditioning,
            torch.Generator().manual_seed(5),
            options=LossOptions(min_snr_gamma=gamma),
        )
        for gamma in (None, 5.0)
    )
    timesteps = torch.randint(1000, (8,), generator=torch.Generator().manual_seed(5))
    signal = published_alphas_cumprod(1000, False)[timesteps]
    snr = signal / (1 - signal)
    torch.testing.assert_close(weighted, plain * (snr.clamp(max=5) / snr).float())


@torch.no_grad()
def test_reference_replaces_the_target_at_the_same_timesteps_and_noise():
    family = make_family()
    denoiser = family.components.denoiser
    latents, conditioning = batch(4)

    def loss(reference_conditioning):
        return family.loss(
            denoiser,
            latents,
            conditioning,
            torch.Generator().manual_seed(5),
            reference=(denoiser, reference_conditioning),
        )

    assert torch.equal(loss(conditioning), torch.zeros(4))
    assert (loss(conditioning.select([1, 2, 3, 0])) > 0).all()


def test_half_precision_loss_is_close_and_in_float32():
    latents, conditioning = batch(4)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        family = make_family(dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        losses.append(
            family.loss(family.components.denoiser, latents, conditioning, generator).detach()
        )
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0.03)


def test_images_are_encoded_to_the_scaled_mean_and_decode_back():
    family = make_family()
    vae = family.components.pipeline.vae
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents, mean * vae.config.scaling_factor)
    family.components.free_image_encoder()
    with torch.no_grad():
        vae.decode(latents / vae.config.scaling_factor)


def test_prompts_are_padded_to_the_full_length_and_cut_with_a_warning():
    family = make_family()
    tokenizer = family.components.pipeline.tokenizer
    with torch.no_grad():
        conditioning = family.encode_prompts(["a", "a b"])
        assert conditioning.prompt_embeds.shape == (2, tokenizer.model_max_length, 32)
        with pytest.warns(UserWarning, match="cut to the 32"):
            cut = family.encode_prompts(["x" * 100])
    assert len(cut) == 1


def test_a_prompt_gradient_reaches_the_text_encoder():
    family = make_family()
    weight = family.components.text_encoders["text_encoder"].get_parameter(
        "final_layer_norm.weight"
    )
    weight.requires_grad_(True)
    latents, _ = batch(1)
    family.loss(
        family.components.denoiser,
        latents,
        family.encode_prompts(["a toy"]),
        torch.Generator().manual_seed(0),
    ).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def pictures(family, seeds, guidance=3.0):
    count = len(seeds)
    with torch.no_grad():
        prompt, negative = family.encode_prompts(["a toy"]), family.encode_prompts([""])
    return family.sample(
        prompt.repeat(count), negative.repeat(count), seeds,
        steps=2, guidance=guidance, width_px=16, height_px=16,
    )  # fmt: skip


def test_a_picture_depends_on_its_own_seed_alone():
    family = make_family()
    together = pictures(family, [7, 8, 9])
    alone = pictures(family, [8])
    assert together[1].tobytes() == alone[0].tobytes()
    assert together[0].tobytes() != together[1].tobytes()


def test_sampling_leaves_the_training_schedule_alone():
    family = make_family("v_prediction", rescale_betas_zero_snr=True)
    before = family.alphas_cumprod.clone()
    pictures(family, [1])
    assert torch.equal(family.alphas_cumprod, before)
    assert family.alphas_cumprod[-1] == 0


def test_not_a_number_is_said_and_not_drawn_black():
    family = make_family()
    with torch.no_grad():
        family.components.denoiser.get_parameter("conv_out.bias").fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinity.*fp32"):
        pictures(family, [1])


def test_a_saved_pipeline_loads_frozen_with_its_own_resolution(tmp_path):
    pipe = tiny_pipeline("sd2")
    pipe.save_pretrained(tmp_path / "base")
    family = load_family(tmp_path / "base", dtype=torch.bfloat16, device=CPU)
    parts = family.components
    assert detect_family(parts.pipeline) == family.name == "sd"
    assert parts.base == str(tmp_path / "base")
    assert (family.resolution_px, family.num_timesteps) == (16, 1000)
    assert parts.denoiser.dtype == torch.bfloat16 and parts.pipeline.vae.dtype == torch.float32
    models = [parts.denoiser, parts.pipeline.vae, *parts.text_encoders.values()]
    assert not any(p.requires_grad for model in models for p in model.parameters())
    assert pictures(family, [0])[0].size == (16, 16)


def test_adapters_name_the_base_that_was_loaded_and_no_path_to_a_built_in_one(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    for given, name in (("mini", "mini"), (tmp_path / "tiny", str(tmp_path / "tiny"))):
        pipe = families.load_pipeline(given)
        pipe.unet.add_adapter(NoraConfig(r=4, inner_r=2, target_modules="mid_block.*to_q"))
        pipe.text_encoder.add_adapter(NoraConfig(r=4, inner_r=2, target_modules=["q_proj"]))
        for what in (pipe, pipe.unet, pipe.text_encoder):
            path = save_adapter(what, tmp_path / "a.safetensors")
            assert adapter_info(path)["base"] == name


def test_dtype_has_an_older_name(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = families.load_pipeline(tmp_path, torch_dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.bfloat16}
    with pytest.raises(UserError, match="give dtype alone"):
        families.load_pipeline(tmp_path, torch_dtype=torch.bfloat16, dtype=torch.bfloat16)


def test_a_built_in_base_says_its_version(tmp_path, monkeypatch):
    pipe = tiny_pipeline("sd15")
    pipe.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "mini.json").write_text('{"name": "small-1", "hash": "abc", "x": 1}')
    monkeypatch.setattr(families, "ASSETS", tmp_path)
    family = load_family("small", dtype=torch.float32, device=CPU)
    assert family.components.base == "small"
    version = {"base_version": "small-1", "base_hash": "abc"}
    assert families.built_in_version("small") == version
    for other in (str(tmp_path / "small"), "owner/small", "../small", "missing"):
        assert families.built_in_version(other) == {}
