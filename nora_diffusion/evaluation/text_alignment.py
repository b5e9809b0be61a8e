"""mini-CLIP score: how well a picture fits its prompt, by the `CLIPModel` that ships with mini.

It knows emoji on simple backgrounds and nothing else, so it is no CLIP-T and is never called so.
Read it between its floor (other prompts) and its ceiling (real composites of the same prompts).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

NAME = "mini-CLIP score"
MINI_CLIP = Path(__file__).parents[1] / "assets" / "mini_clip"


@cache
def load_clip(folder: str | Path = MINI_CLIP) -> tuple[Any, Any]:
    """Returns the `CLIPModel` in `folder`, frozen and in float32, and its processor."""
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoProcessor.from_pretrained(folder)


def embed_images(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Unit-length embeddings (N, D) of prepared pictures (N, 3, S, S)."""
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Unit-length embeddings (N, D) of token ids (N, L), padded after their end token."""
    # Causal, and read at the first end token: what is padded after it changes nothing.
    pooled = model.text_model(input_ids=input_ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


@torch.inference_mode()
def image_features(
    images: Sequence[Image.Image], folder: str | Path = MINI_CLIP, batch_size: int = 100
) -> torch.Tensor:
    """Unit-length embeddings (N, D) of PIL images by the `CLIPModel` in `folder`."""
    model, processor = load_clip(folder)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [image.convert("RGB") for image in images[start : start + batch_size]]
        pixels = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        parts.append(embed_images(model, pixels))
    return torch.cat(parts)


@torch.inference_mode()
def text_features(texts: Sequence[str], folder: str | Path = MINI_CLIP) -> torch.Tensor:
    """Unit-length embeddings (N, D) of texts by the `CLIPModel` in `folder`."""
    model, processor = load_clip(folder)
    ids = processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return embed_texts(model, ids["input_ids"])


def mini_clip_score(images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
    """The mini-CLIP score of each picture: cosine (N,) to the prompt of the same index.

    Args:
        images: N PIL images.
        prompts: N prompts.

    Raises:
        ValueError: there are not as many prompts as pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: must be as many")
    return (image_features(images) * text_features(prompts)).sum(-1)


def retrieval(images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """How often the right one is found among all, for pairs of rows.

    Args:
        images: unit-length embeddings (N, D).
        texts: unit-length embeddings (N, D); row i belongs to picture i.

    Returns:
        Shares in [0, 1]: image_to_text_top1, image_to_text_top5, text_to_image_top1 and
        text_to_image_top5.
    """
    similarity = images @ texts.T
    right = torch.arange(len(images))[:, None]
    found = {}
    for name, rows in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = rows.argsort(dim=1, descending=True)
        for k in (1, 5):
            found[f"{name}_top{k}"] = float((order[:, :k] == right).any(1).float().mean())
    return found
