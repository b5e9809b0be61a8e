"""A tiny base on disk, photos of a subject, and runs that take a second or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from nora_diffusion.config import DreamboothConfig
from tests.tiny import tiny_pipeline

MakeConfig = Callable[..., DreamboothConfig]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make_config(base, subject, tmp_path, monkeypatch) -> MakeConfig:
    """Builds a config; sections are given as keyword arguments, values over these defaults."""
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "cache"))
    values = defaults(base, subject, tmp_path)
    return lambda **sections: made_config(values, sections)


def defaults(base: Path, subject: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Settings for quick runs in a folder."""
    return {
        "model": {"base": str(base), "device": "cpu"},
        # The default start would be fitted first, by 16 passes a run.
        "adapter": {"r": 8, "inner_r": 2, "init": "orthogonal"},
        "text_encoder": {"r": 8, "inner_r": 2},
        "data": {"subject": str(subject), "class_name": "toy"},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 0, "lr_warmup_steps": 2},
        "sample": {"prompts": ["a {trigger} {class_name}"], "n": 1, "steps": 1},
        "output": {"dir": str(folder / "run")},
    }


def made_config(
    defaults: dict[str, dict[str, Any]], sections: dict[str, dict[str, Any]]
) -> DreamboothConfig:
    values = {name: {**default, **sections.get(name, {})} for name, default in defaults.items()}
    return DreamboothConfig.model_validate(values)


class Calls:
    """Counts the denoiser calls of training steps; ``at`` runs before the call of that number."""

    def __init__(self) -> None:
        self.count = 0
        self.at: dict[int, Callable[[UNet2DConditionModel], None]] = {}

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if not isinstance(module, UNet2DConditionModel) or module.device.type == "meta":
            return  # the memory plan runs a model without weights
        if torch.is_grad_enabled():
            self.count += 1
            if self.count in self.at:
                self.at[self.count](module)


@pytest.fixture
def calls() -> Iterator[Calls]:
    with counted_calls() as counter:
        yield counter


@contextmanager
def counted_calls() -> Iterator[Calls]:
    counter = Calls()
    handle = register_module_forward_pre_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()
