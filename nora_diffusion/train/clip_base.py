"""CLIP-like models behind one face: pictures and texts in, unit-length embeddings out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nora_diffusion.adapter import attention_projections
from nora_diffusion.evaluation.text_alignment import MINI_CLIP, embed_images, embed_texts
from nora_diffusion.settings import UserError, quote
from nora_diffusion.train.packed_attention import split_attention

BATCH = 100  # pictures embedded at once where no gradient is needed


@dataclass(frozen=True)
class ClipBase:
    """A CLIP-like model and what it takes to use it.

    Attributes:
        model: with every projection of its attention a linear layer of its own.
        prepare: PIL images -> pixels (N, 3, S, S).
        tokenise: texts -> token ids (N, L).
        embed_images: pixels -> unit-length embeddings (N, D).
        embed_texts: token ids -> unit-length embeddings (N, D).
        towers: "vision" and "language" -> a test whether a module name is in the tower.
    """

    model: nn.Module
    prepare: Callable[[Sequence[Image.Image]], Tensor]
    tokenise: Callable[[Sequence[str]], Tensor]
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Tensor], Tensor]
    towers: dict[str, Callable[[str], bool]]

    @property
    def scale(self) -> Tensor:
        """The factor on cosines that makes them logits."""
        return self.model.logit_scale.exp()  # pyright: ignore[reportCallIssue]

    def targets(self, towers: Sequence[str]) -> list[str]:
        """Names of the attention projections in `towers`: query, key, value and output."""
        return [
            name
            for name in attention_projections(self.model)
            if any(self.towers[tower](name) for tower in towers)
        ]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings (N, D) of pixels (N, 3, S, S) in batches, without gradient."""
        return torch.cat([self.embed_images(part) for part in pixels.split(BATCH)])


def load_clip_base(base: str, dtype: torch.dtype, device: torch.device) -> ClipBase:
    """Loads ``"mini_clip"``, a hub id or folder of a `CLIPModel`, or a folder of OpenCLIP.

    Raises:
        UserError: it cannot be loaded, or OpenCLIP is needed and missing.
    """
    check_clip_base(base)
    if _is_open_clip(base):
        return _open_clip(base, dtype, device)
    from transformers import CLIPModel, CLIPProcessor

    source = _check_config(base)
    try:
        model = CLIPModel.from_pretrained(source, dtype=dtype)
        processor = CLIPProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise _no_clip(base, error) from None
    model.eval().requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]
    return wrap_clip(model, processor)


def check_clip_base(base: str) -> None:
    """Refuse what needs no download to be seen: a path to nothing, or another type of model.

    Raises:
        UserError: saying what is wanted.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        if not _is_open_clip(base):
            _check_config(base)
    elif path.is_absolute() or base.count("/") > 1:
        raise UserError(
            f"model.base = {quote(base)}: no such folder; give that of a CLIPModel or of OpenCLIP, "
            'a hub id, or "mini_clip"'
        )


def _check_config(base: str) -> str:
    """Where a `CLIPModel` is, once its config is found to be that of one."""
    from transformers import AutoConfig, CLIPConfig

    path = Path(base).expanduser()
    source = str(MINI_CLIP) if base == "mini_clip" else str(path) if path.is_dir() else base
    try:
        found = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _no_clip(base, error) from None
    if not isinstance(found, CLIPConfig):
        # CLIPModel would take it, with weights drawn at random where it has none of that name.
        raise UserError(
            f"model.base = {quote(base)}: is a model of type {quote(found.model_type)}; "
            'model.task = "few_shot" takes a CLIPModel, or a folder of OpenCLIP'
        )
    return source


def _no_clip(base: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"model.base = {quote(base)}: no CLIPModel could be loaded: {lines[0]}")


def _is_open_clip(base: str) -> bool:
    return (Path(base).expanduser() / "open_clip_config.json").is_file()


def wrap_clip(model: Any, processor: Any) -> ClipBase:
    """A `CLIPModel` of transformers and its processor as a `ClipBase`."""
    device, dtype = model.logit_scale.device, model.visual_projection.weight.dtype

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        batch = [image.convert("RGB") for image in images]
        return processor.image_processor(batch, return_tensors="pt")["pixel_values"].to(
            device, dtype
        )

    def tokenise(texts: Sequence[str]) -> Tensor:
        tokens = processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return tokens["input_ids"].to(device)

    return ClipBase(
        model,
        prepare,
        tokenise,
        lambda pixels: embed_images(model, pixels),
        lambda ids: embed_texts(model, ids),
        {
            "vision": lambda name: name.startswith("vision_model."),
            "language": lambda name: name.startswith("text_model."),
        },
    )


def _open_clip(base: str, dtype: torch.dtype, device: torch.device) -> ClipBase:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f'model.base = "{base}": an OpenCLIP folder needs the package open_clip_torch; '
            "pip install open_clip_torch"
        ) from None
    source = f"local-dir:{Path(base).expanduser()}"
    model, preprocess = open_clip.create_model_from_pretrained(source, device=device)
    model.to(dtype).requires_grad_(False)
    return wrap_open_clip(model, preprocess, open_clip.get_tokenizer(source))


def wrap_open_clip(model: Any, preprocess: Any, tokenizer: Any) -> ClipBase:
    """A model with OpenCLIP's interface, its attention taken apart, as a `ClipBase`.

    Args:
        model: with `encode_image`, `encode_text` and `logit_scale`; its vision tower is `visual`.
        preprocess: one PIL image -> pixels (3, S, S).
        tokenizer: list of texts -> token ids (N, L).
    """
    split_attention(model.eval())
    device, dtype = model.logit_scale.device, next(model.visual.parameters()).dtype
    return ClipBase(
        model,
        lambda images: torch.stack([preprocess(image) for image in images]).to(device, dtype),
        lambda texts: tokenizer(list(texts)).to(device),
        lambda pixels: F.normalize(model.encode_image(pixels), dim=-1),
        lambda ids: F.normalize(model.encode_text(ids), dim=-1),
        {
            "vision": lambda name: name.startswith("visual."),
            "language": lambda name: not name.startswith("visual."),
        },
    )
