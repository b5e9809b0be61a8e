"""Adapter, prompts and seeds to pictures with their origin inside."""

from __future__ import annotations

import io
import itertools
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nora_diffusion import __version__
from nora_diffusion.adapter import kept_updates
from nora_diffusion.adapter.files import AdapterFileError, adapter_info
from nora_diffusion.adapter.loading import find_files
from nora_diffusion.config import RUN_CONFIG, UserError, fill_prompt
from nora_diffusion.denoiser_hooks import load_adapter
from nora_diffusion.disk import write_atomically
from nora_diffusion.events import read_events
from nora_diffusion.families import load_family
from nora_diffusion.families.base import (
    Conditioning,
    Family,
    resolve_device,
    resolve_dtype,
)
from nora_diffusion.families.encoding import check_seeds
from nora_diffusion.families.safety import attach_safety_checker, screened
from nora_diffusion.run_config import command_of
from nora_diffusion.run_folder import CHECKPOINTS, EVENTS, check_out
from nora_diffusion.settings import read_toml

ADAPTER_FILE = "adapter.safetensors"
STEPS, GUIDANCE = 25, 5.0
_BATCH_PX = 2 * 512 * 512  # pixels denoised at once: two 512 px pictures fit 8 GB


def sample_to_folder(
    run_or_file: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    n: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    base: str | None = None,
    weight: float = 1.0,
    width: int | None = None,
    height: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Path]:
    """Write ``n`` pictures of each prompt as PNG files that say how they were made.

    Args:
        run_or_file: run folder, or adapter file.
        prompts: ``{trigger}`` and ``{class_name}`` are filled in from the adapter.
        out: folder for the pictures; made if missing. Pictures that are there already are kept:
            one of the same name is written as ``...-2.png``, and so on.
        n: pictures a prompt.
        seed: of the first picture of each prompt; picture i has seed + i.
        steps: denoising steps; None: those of the run's own samples, or 25 for a single file.
        guidance: classifier-free guidance scale; None: the run's own, or 5 for a single file.
        negative_prompt: what the pictures should not show.
        base: base model; None: the one the adapter was trained on.
        weight: factor on the adapter's effect; 0 gives the base's own pictures.
        width: in px; None: the base's own.
        height: in px; None: the base's own.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", "fp32", "bf16" or "fp16".

    Returns:
        The files, prompt by prompt.

    Raises:
        UserError: when the run has no adapter yet, no base is known, a number is one that this
            base cannot draw with, or ``out`` cannot be written.
        AdapterFileError: when the adapter does not fit the base.
    """
    seeds = range(seed, seed + n)
    check_seeds(seeds)
    _check_finite(weight=weight, guidance=guidance or 0.0)
    path = adapter_path(run_or_file)
    info = adapter_info(path)
    out = Path(out).expanduser()
    check_out(out)  # before minutes are spent on pictures that could not be kept
    family = load_adapted(path, base=base, weight=weight, device=device, dtype=dtype)
    names = (info.get("trigger") or "", info.get("class_name") or "")
    texts = [fill_prompt(prompt, *names) for prompt in prompts]
    negative = negative_prompt or ""
    of_run = sample_settings(path)
    steps = steps or int(of_run.get("steps", STEPS))
    guidance = float(of_run.get("guidance", GUIDANCE)) if guidance is None else guidance
    rows = sample_prompts(
        family, texts, seeds, negative_prompt=negative, steps=steps, guidance=guidance,
        width_px=width, height_px=height,
    )  # fmt: skip
    made_with = {
        "negative_prompt": negative,
        "steps": steps,
        "guidance": guidance,
        # Names without the rest of the path: pictures are shown to others.
        "adapter": "/".join(path.resolve().parts[-2:]),
        "adapter_checksum": info["checksum"],
        "adapter_weight": weight,
        "base": shown_base(family.components.base),
        "family": family.name,
    }
    return _write_pictures(out, texts, seeds, rows, made_with)


def adapter_path(run_or_file: str | Path) -> Path:
    """The adapter file of a folder (of a run, an export or any other), or the file itself.

    An export with a sub-folder for each model stands for itself.

    Raises:
        UserError: when there is none.
    """
    path = Path(run_or_file).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run folder or an adapter file")
    try:
        file, *others = find_files(path)
        return path if others else file
    except AdapterFileError as error:
        is_run = (path / RUN_CONFIG).is_file() or (path / CHECKPOINTS).is_dir()
        events = read_events(path / EVENTS)
        # What ends in scores of many trainings is done without an adapter.
        if not is_run or events and events[-1]["event"] == "done":
            raise UserError(str(error)) from error
        command = command_of(path / RUN_CONFIG) or "nora-dreambooth"
        raise UserError(
            f"{path}: this run is not finished, so it has no {ADAPTER_FILE} yet; "
            f"finish it with: {command} --resume {shlex.quote(str(path))}"
        ) from error


def sample_settings(path: Path) -> dict[str, Any]:
    """``[sample]`` of the run whose adapter the file is; empty for a file of its own."""
    config = path.parent / RUN_CONFIG
    if path.name != ADAPTER_FILE or not config.is_file():
        return {}
    try:
        return read_toml(config).get("sample", {})
    except UserError:  # spoilt by hand: the pictures can do without
        return {}


def load_adapted(
    run_or_file: str | Path,
    *,
    base: str | None = None,
    weight: float = 1.0,
    device: str = "auto",
    dtype: str = "auto",
) -> Family:
    """Load an adapter on its base model, ready for ``sample_prompts``; arguments as above.

    A safety checker that the base has is kept: pictures it objects to come out black.

    Raises:
        UserError: when no base is known or the device is missing.
        AdapterFileError: when the adapter does not fit the base.
    """
    path = adapter_path(run_or_file)
    base = base or adapter_info(path).get("base")
    if not base:
        raise UserError(f"{path}: it does not name its base model; give one with --base")
    where = resolve_device(device)
    family = load_family(base, dtype=resolve_dtype(dtype, where), device=where)
    attach_safety_checker(family)
    load_adapter(family.components.pipeline, path, weight=weight)
    return family


@torch.no_grad()
def sample_prompts(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str = "",
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    width_px: int | None = None,
    height_px: int | None = None,
) -> list[list[Image.Image]]:
    """Pictures of every prompt with every seed: a row for each prompt."""
    return sample_conditioning(
        family, family.encode_prompts(prompts),
        family.encode_prompts([negative_prompt], negative=True), seeds,
        steps=steps, guidance=guidance, width_px=width_px, height_px=height_px,
    )  # fmt: skip


def sample_conditioning(
    family: Family,
    conditioning: Conditioning,
    negative: Conditioning,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    width_px: int | None = None,
    height_px: int | None = None,
) -> list[list[Image.Image]]:
    """As ``sample_prompts``, from prompts encoded before: P of them, and one negative."""
    width, height = width_px or family.resolution_px, height_px or family.resolution_px
    pairs = [(row, seed) for row in range(len(conditioning)) for seed in seeds]
    size = max(1, min(16, _BATCH_PX // (width * height)))
    images: list[Image.Image] = []
    with kept_updates(family.components.denoiser):
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            drawn = family.sample(
                conditioning.select([row for row, _ in batch]),
                negative.repeat(len(batch)),
                [seed for _, seed in batch],
                steps=steps,
                guidance=guidance,
                width_px=width,
                height_px=height,
            )
            images += screened(family, drawn)
    columns = len(seeds)
    return [images[row * columns : (row + 1) * columns] for row in range(len(conditioning))]


def _write_pictures(
    out: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rows: Sequence[Sequence[Image.Image]],
    made_with: dict[str, Any],
) -> list[Path]:
    files: list[Path] = []
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for seed, image in zip(seeds, row, strict=True):
            path = _free(picture_path(out, index, prompt, seed))
            files.append(save_png(image, path, {"prompt": prompt, "seed": seed, **made_with}))
    return files


def picture_path(folder: Path, index: int, prompt: str, seed: int) -> Path:
    """Name of a picture: number of its prompt, words of it, and seed."""
    return folder / f"{index:02d}-{_slug(prompt)}-seed{seed}.png"


def save_png(image: Image.Image, path: str | Path, origin: dict[str, Any]) -> Path:
    """Write a PNG whose text chunks say that it is AI-generated, by what, and from what.

    The file is whole or absent.
    """
    info = PngInfo()
    info.add_text("Software", f"nora-diffusion {__version__}")
    info.add_text("Comment", "AI-generated")
    for key, value in origin.items():
        info.add_text(key, str(value))
    path = Path(path)
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=info)
    write_atomically(path, data.getvalue())
    return path


def _slug(text: str) -> str:
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    # File systems count bytes (255), and a letter may have four.
    return words.encode(errors="replace")[:60].decode(errors="ignore") or "empty"


def _free(path: Path) -> Path:
    """The path, or if there is such a file the first of ``name-2``, ``name-3``, ... that is not."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def shown_base(base: str) -> str:
    """A base's name for others to read: of a local one its file or folder alone."""
    return Path(base).name if Path(base).is_absolute() else base


def _check_finite(**numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(f"{name} = {number} (--{name}): give a finite number")
