"""Stage 1: the autoencoder, an `AutoencoderTiny` (8x, 16 latent channels, no norm layers).

No block runs at full resolution, where a CPU spends most of its time; the latents are kept near
unit variance and get a little noise in training, so that small errors of a denoiser stay small.
"""

import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from nora_diffusion.mini.compose import Compositor, to_signed
from nora_diffusion.mini.sources import concepts, write_manifest
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state

LATENT_CHANNELS = 16
CHUNK = 2048  # composites made at once; a resumed run starts at a chunk's beginning


def build_autoencoder(
    width: int = 48, decoder_blocks: tuple[int, ...] = (4, 3, 2, 0)
) -> AutoencoderTiny:
    """Returns the untrained autoencoder: images (B, 3, H, W) <-> latents (B, 16, H/8, W/8)."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=decoder_blocks,
    )


def autoencoder_loss(
    model: AutoencoderTiny, images: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Reconstruction in value and in edges, plus a pull of the latents towards unit variance.

    Args:
        model: the autoencoder.
        images: (B, 3, H, W) in [-1, 1].
        noise: (B, 16, H/8, W/8), added to the latents at a twentieth of its size.

    Returns:
        A scalar.
    """
    latents = model.encoder(images)
    output = model.decoder(latents + 0.05 * noise).float()
    error = output - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    value = error.abs().mean() + 2 * F.mse_loss(output, images)
    flat = latents.float().transpose(0, 1).flatten(1)
    spread = flat.mean(1).square().mean() + (flat.std(1) - 1).square().mean()
    return value + 0.5 * edges + 0.02 * spread


def train_autoencoder(
    work: Path,
    size_px: int,
    samples: int,
    device: str,
    batch_size: int = 16,
    learning_rate: float = 1.5e-3,
) -> AutoencoderTiny:
    """Trains, or continues, the autoencoder for `samples` pictures and returns its average.

    Args:
        work: work folder; the state is ``work/autoencoder.safetensors``.
        size_px: side of the pictures.
        samples: length of the whole run, the part already done included.
        device: "cpu" or "cuda".
        batch_size: pictures a step.
        learning_rate: peak of the cosine.

    Returns:
        The averaged autoencoder in float32, in eval mode.
    """
    state_path = work / "autoencoder.safetensors"
    torch.manual_seed(0)
    model = build_autoencoder()
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType]
    trained = Trained(model, learning_rate, ema_decay=0.998)
    if state_path.exists():
        tensors, progress = load_state(state_path)
        trained.restore(tensors, progress["step"])
    total = samples // batch_size
    if trained.step < total:
        seen = concepts(work, "everything")
        write_manifest(seen, work / "manifests" / "autoencoder.txt")
        compositor = Compositor(seen, size_px, backgrounds=3000, device=device, seed=1)
        while trained.step < total:
            chunk = trained.step * batch_size // CHUNK
            images, _, _ = compositor.sample(CHUNK, seed=1_000_000 + chunk)
            loss, rate = _train_chunk(trained, images, total, batch_size, device)
            psnr = _psnr(model, to_signed(images[:64].to(device)))
            print(
                f"autoencoder step {trained.step}/{total} loss {loss:.4f} "
                f"psnr {psnr:.2f} dB {rate:.0f} samples/s",
                flush=True,
            )
            save_state(state_path, trained.tensors(), {"step": trained.step})
    return trained.use_average().eval()


def _train_chunk(trained: Trained, images: torch.Tensor, total: int, batch_size: int, device: str):
    begin, losses = time.perf_counter(), []
    generator = torch.Generator().manual_seed(trained.step)
    for batch in to_signed(images).split(batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        n, _, height, width = batch.shape
        shape = (n, LATENT_CHANNELS, height // 8, width // 8)
        noise = torch.randn(shape, generator=generator).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = autoencoder_loss(trained.module, batch, noise)
        loss.backward()
        trained.update(learning_rate_at(trained.step, total, trained.learning_rate))
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses), len(images) / (time.perf_counter() - begin)


@torch.no_grad()
def _psnr(model: AutoencoderTiny, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of `images` in [-1, 1] after a round trip."""
    output = model.decoder(model.encoder(images)).clamp(-1, 1)
    mse = ((output - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())
