"""Timesteps reach the layers of adapters with a timestep law, and nobody else."""

import warnings

import pytest
import torch

from nora_diffusion import load_adapter, save_adapter
from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.denoiser_hooks import attach_timestep_rank, timestep_progress
from tests.tiny import adapt, predict, tiny_pipeline

LAW = {"alpha": 1.0, "k_min": 0}


def layers(pipe):
    return [layer for _, layer in iter_nora_layers(pipe.unet)]


def call(unet, timestep, batch=2, **kwargs):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator).expand(batch, -1, -1, -1)
    embeds = torch.randn(1, 32, 32, generator=generator).expand(batch, -1, -1)
    with torch.no_grad():
        return unet(latents, timestep, encoder_hidden_states=embeds, **kwargs).sample


def test_every_sample_gets_the_rank_of_its_own_timestep():
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    attach_timestep_rank(pipe.unet, 1000)
    # At t = T no inner dimension is active, so the answer is the base's.
    mixed = call(pipe.unet, torch.tensor([1000, 0]))
    base = call(plain.unet, torch.tensor([1000, 0]))
    torch.testing.assert_close(mixed[0], base[0], rtol=0, atol=1e-6)
    assert (mixed[1] - base[1]).abs().max() > 1e-3
    # At t = 0 all are: the answer is that of an adapter without the law.
    full = tiny_pipeline()
    adapt(full, text_encoders=False)
    expected = call(full.unet, torch.tensor([1000, 0]))
    torch.testing.assert_close(mixed[1], expected[1], rtol=0, atol=1e-5)


def test_guidance_doubled_batches_and_numbers_are_understood():
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    attach_timestep_rank(pipe.unet, 1000)
    doubled = call(pipe.unet, 300, batch=4)  # one number for all, as pipelines give it
    for half in (torch.tensor(300), torch.tensor([300]), torch.tensor([300] * 4)):
        torch.testing.assert_close(call(pipe.unet, half, batch=4), doubled, rtol=0, atol=1e-6)
    latents = torch.zeros(4, 1)
    pairs = timestep_progress(torch.tensor([100, 900]), latents, 1000)
    torch.testing.assert_close(pairs, torch.tensor([0.1, 0.9, 0.1, 0.9]))
    assert timestep_progress(0.25, latents, 1.0).tolist() == [0.25] * 4
    with pytest.raises(ValueError, match="3 timesteps for a batch of 4"):
        timestep_progress(torch.tensor([1, 2, 3]), latents, 1000)


def test_keyword_timesteps_are_found():
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    attach_timestep_rank(pipe.unet, 1000)
    latents, embeds = torch.ones(1, 4, 8, 8), torch.ones(1, 32, 32)
    with torch.no_grad():
        by_name = pipe.unet(sample=latents, timestep=700, encoder_hidden_states=embeds).sample
        by_place = pipe.unet(latents, 700, embeds).sample
    assert torch.equal(by_name, by_place)


def test_latents_are_found_by_name_wherever_they_stand():
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    attach_timestep_rank(pipe.unet, 1000)
    latents, embeds = torch.ones(2, 4, 8, 8), torch.ones(2, 32, 32)
    with torch.no_grad():
        by_name = pipe.unet(return_dict=False, timestep=700, sample=latents,
                            encoder_hidden_states=embeds)[0]  # fmt: skip
        by_place = pipe.unet(latents, 700, embeds).sample
    assert torch.equal(by_name, by_place)


def test_a_law_without_timesteps_is_warned_of_once(monkeypatch):
    monkeypatch.setattr("nora_diffusion.adapter.update._WARNED", set())
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    with pytest.warns(UserWarning, match="not told the timestep.*attach_timestep_rank") as told:
        call(pipe.unet, 500)
        call(pipe.unet, 500)
    assert sum("not told the timestep" in str(warning.message) for warning in told) == 1
    monkeypatch.setattr("nora_diffusion.adapter.update._WARNED", set())
    attach_timestep_rank(pipe.unet, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe.unet, 500)


def test_without_a_law_nothing_is_pushed_and_nothing_changes():
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False)
    before = call(pipe.unet, 500)
    attach_timestep_rank(pipe.unet, 1000)
    assert torch.equal(call(pipe.unet, 500), before)
    assert all(layer._progress is None for layer in layers(pipe))


def test_attaching_twice_is_once_and_the_handle_takes_it_off():
    pipe = tiny_pipeline()
    adapt(pipe, text_encoders=False, timestep_rank=LAW)
    handle = attach_timestep_rank(pipe.unet, 1000)
    assert attach_timestep_rank(pipe.unet, 1000) is handle
    assert len(pipe.unet._forward_pre_hooks) == 1
    handle.remove()
    assert not pipe.unet._forward_pre_hooks
    assert attach_timestep_rank(pipe.unet, 1000) is not handle


def test_a_loaded_adapter_with_a_law_works_in_the_whole_pipeline(tmp_path):
    trained = tiny_pipeline()
    adapt(trained, text_encoders=False, timestep_rank=LAW)
    attach_timestep_rank(trained.unet, 1000)
    save_adapter(trained, tmp_path / "a.safetensors")
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    load_adapter(pipe, tmp_path / "a.safetensors")
    torch.testing.assert_close(predict(pipe), predict(trained))
    assert (predict(pipe) - predict(plain)).abs().max() > 1e-3
    bare = tiny_pipeline().unet
    load_adapter(bare, tmp_path / "a.safetensors")
    times = torch.tensor([900, 100])
    torch.testing.assert_close(call(bare, times), call(trained.unet, times))
