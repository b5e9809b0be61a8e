"""What turns pictures and prompts into features: the networks behind every score, by name.

EffNet-Lite2 and mini-CLIP come with Python packages. The published scores (DINO, DINOv2, CLIP-I,
CLIP-T) need their networks from the Hugging Face hub or a local folder: ``NAME=FOLDER``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nora_diffusion.config import UserError
from nora_diffusion.evaluation import image_features as effnet
from nora_diffusion.evaluation import text_alignment

HUB = {
    "dino": ("DINO ViT-S/16", "facebook/dino-vits16"),
    "dinov2": ("DINOv2 ViT-B/14", "facebook/dinov2-base"),
    "clip": ("CLIP ViT-B/32", "openai/clip-vit-base-patch32"),
}
OFFLINE = {"effnet": effnet.NAME, "mini_clip": "mini-CLIP"}
BATCH = 32


@dataclass(frozen=True)
class Backend:
    """A network to compare pictures with.

    Attributes:
        name: as it stands beside every score.
        embed: pictures -> unit-length features (N, D).
        embed_texts: texts -> unit-length features (N, D) in the same space, where it has one.
        of_subjects: whether its cosine between pictures says that they show the same subject.
    """

    name: str
    embed: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    of_subjects: bool = True


def load_backend(spec: str, device: torch.device) -> Backend:
    """A backend by name, ``NAME`` or ``NAME=FOLDER_OR_ID``.

    Raises:
        UserError: when there is none of that name, or its network cannot be had.
    """
    name, _, source = spec.partition("=")
    if name in OFFLINE and not source:
        return _effnet() if name == "effnet" else _mini_clip()
    if name not in HUB:
        known = ", ".join((*OFFLINE, *HUB))
        raise UserError(f"--backend {spec}: there is no such backend; choose from {known}")
    shown, hub_id = HUB[name]
    source = source or hub_id
    try:
        return (_clip if name == "clip" else _vit)(shown, source, device)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--backend {spec}: {shown} cannot be loaded from {source} ({_first_line(error)}); "
            f"give a folder that holds it, --backend {name}=FOLDER, or choose effnet and mini_clip"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _effnet() -> Backend:
    try:
        effnet.check()
    except ImportError as error:
        raise UserError(f"--backend effnet: {error}") from None
    return Backend(effnet.NAME, effnet.image_features)


def _mini_clip() -> Backend:
    # It knows kinds of things and backgrounds: pictures of one subject in two places are far apart.
    embed, embed_texts = text_alignment.image_features, text_alignment.text_features
    return Backend(OFFLINE["mini_clip"], embed, embed_texts, of_subjects=False)


def _clip(shown: str, source: str, device: torch.device) -> Backend:
    from transformers import AutoProcessor, CLIPModel

    model: Any = CLIPModel.from_pretrained(source, dtype=torch.float32).eval().to(device)  # pyright: ignore[reportArgumentType]
    processor = AutoProcessor.from_pretrained(source)

    def embed(images: Sequence[Image.Image]) -> Tensor:
        pixels = _pixels(processor.image_processor, images).to(device)
        return text_alignment.embed_images(model, pixels).cpu()

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> Tensor:
        tokens = processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        return text_alignment.embed_texts(model, tokens["input_ids"]).cpu()

    return Backend(shown, _in_batches(embed), embed_texts)


def _vit(shown: str, source: str, device: torch.device) -> Backend:
    """A self-supervised vision transformer, read at its class token."""
    from transformers import AutoImageProcessor, AutoModel

    model: Any = AutoModel.from_pretrained(source, dtype=torch.float32).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(source)

    def embed(images: Sequence[Image.Image]) -> Tensor:
        hidden = model(pixel_values=_pixels(processor, images).to(device)).last_hidden_state
        return F.normalize(hidden[:, 0], dim=-1).cpu()

    return Backend(shown, _in_batches(embed))


def _pixels(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    batch = [image.convert("RGB") for image in images]
    return processor(batch, return_tensors="pt")["pixel_values"]


def _in_batches(
    embed: Callable[[Sequence[Image.Image]], Tensor],
) -> Callable[[Sequence[Image.Image]], Tensor]:
    @torch.inference_mode()
    def batched(images: Sequence[Image.Image]) -> Tensor:
        starts = range(0, len(images), BATCH)
        return torch.cat([embed(images[start : start + BATCH]) for start in starts])

    return batched
