"""Going on from an exported mini: a copy of it in the work folder, and its parts."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Start:
    """The exported mini in `folder`, all of it in float32."""

    folder: Path

    @property
    def about(self) -> dict:
        """Its mini.json: name, hash and recipe."""
        return json.loads((self.folder / "mini.json").read_text(encoding="utf-8"))

    def autoencoder(self) -> AutoencoderTiny:
        """Its autoencoder, which takes pictures of any size."""
        return AutoencoderTiny.from_pretrained(self.folder / "vae").eval()

    def unet(self, size_px: int) -> UNet2DConditionModel:
        """Its UNet for pictures of `size_px`: convolutions and attention know no size."""
        unet = UNet2DConditionModel.from_pretrained(self.folder / "unet")
        unet.register_to_config(sample_size=size_px // 8)
        return unet

    def text_encoder(self) -> CLIPTextModel:
        """Its text encoder."""
        return CLIPTextModel.from_pretrained(self.folder / "text_encoder", dtype=torch.float32)

    def tokenizer(self) -> CLIPTokenizer:
        """Its tokenizer."""
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")


def adopt(given: Path | None, work: Path) -> Start | None:
    """The mini that the run in `work` goes on from, or None where it begins from nothing.

    It is copied to ``work/start`` the first time, so that a later stage need not be told again,
    and its lists of emoji shown to ``work/manifests``.

    Raises:
        ValueError: `given` holds no exported mini, or the run in `work` began from something else.
    """
    kept = work / "start"
    if given is not None and not (given / "mini.json").is_file():
        raise ValueError(f"--start {given}: no exported mini, mini.json is missing")
    if kept.exists():
        found = Start(kept)
        if given is not None and Start(given).about["hash"] != found.about["hash"]:
            raise ValueError(f"--start {given}: {work} goes on from {found.about['name']} already")
        return found
    if given is None:
        return None
    if (work / "denoiser.safetensors").exists():
        raise ValueError(f"--start {given}: {work} holds a run that began from nothing")
    temporary = work / f".start.{os.getpid()}"
    shutil.copytree(given, temporary, dirs_exist_ok=True)
    shutil.copytree(given / "manifests", work / "manifests", dirs_exist_ok=True)
    os.replace(temporary, kept)
    return Start(kept)
