"""TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.disk import write_atomically
from nora_diffusion.schema import get_key, list_keys
from nora_diffusion.settings import quote

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
RUN_ID = "run-id.txt"
"""In the folder of W&B's files: what makes a resumed run go on in the same W&B run."""


def open_trackers(cfg: DreamboothConfig, run: Path) -> list[Any]:
    """The trackers the config asks for, as ``accelerate.tracking.GeneralTracker``.

    Raises:
        UserError: when one is not installed, or W&B cannot start.
    """
    opened: list[Any] = []
    if cfg.output.tensorboard or cfg.output.wandb is not None:
        from accelerate import PartialState

        PartialState()  # trackers and their logger ask it which process this is
    if cfg.output.tensorboard:
        opened.append(_open_tensorboard(run))
    if cfg.output.wandb is not None:
        opened.append(_open_wandb(cfg, cfg.output.wandb, run))
    return opened


def check_trackers(cfg: DreamboothConfig) -> None:
    """See to it that the trackers can be had, before anything is written.

    Raises:
        UserError: when one is not installed.
    """
    if cfg.output.tensorboard:
        _require("output.tensorboard = true", "tensorboard", "TensorBoard")
    if cfg.output.wandb is not None:
        _require(f"output.wandb = {quote(cfg.output.wandb)}", "wandb", "Weights & Biases")


def log_picture(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    """Show one picture."""
    if tracker.name == "tensorboard":
        pixels = np.asarray(image)[None]
        tracker.log_images({name: pixels}, step, dataformats="NHWC")
    else:
        tracker.log_images({name: [image]}, step)


def _require(setting: str, library: str, name: str) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"{setting}: {name} is not installed; run: "
            f'pip install "nora-diffusion[{library}]", or leave the key out'
        ) from error


def _open_tensorboard(run: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(TENSORBOARD_FOLDER, run)
    tracker.start()
    return tracker


def _open_wandb(cfg: DreamboothConfig, project: str, run: Path) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    folder = run / WANDB_FOLDER  # W&B makes it as well, under this very name
    folder.mkdir(exist_ok=True)
    identity = folder / RUN_ID
    resume = identity.is_file()
    if not resume:
        write_atomically(identity, uuid.uuid4().hex[:8].encode())
    settings = {key.name: get_key(cfg, key.name) for key in list_keys(DreamboothConfig)}
    tracker = WandBTracker(
        project,
        dir=str(run),
        name=run.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow" if resume else None,
        config=settings,
        settings=wandb.Settings(console="off"),  # the progress bar is no log
    )
    try:
        tracker.start()
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"output.wandb = {quote(project)}: W&B cannot start ({error}); run wandb login, or set "
            "WANDB_MODE=offline to keep the log in the run folder, or leave the key out"
        ) from error
    return tracker
