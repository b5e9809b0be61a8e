"""Held-out emoji as subjects: a few views to learn from, others to be measured against.

A view is an animation frame on its own background; training and held-out views share neither.
``python -m nora_diffusion.mini.subjects`` writes the sample subject of this project.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from nora_diffusion.evaluation.image_features import to_pil
from nora_diffusion.mini.backgrounds import COLOURS, SCENES, draw_background
from nora_diffusion.mini.compose import Compositor, Placement
from nora_diffusion.mini.sources import Concept, animated_path, concept_lists, still_path

# Subjects of the benchmark: held out, animated, of eight different classes.
SUBJECTS = (
    "person surfing",
    "poodle",
    "black cat",
    "tropical fish",
    "hibiscus",
    "racing car",
    "backpack",
    "shortcake",
)


@dataclass(frozen=True)
class Views:
    """Pictures of one subject: uint8 `train` (N, 3, S, S), `held_out` (M, 3, S, S)."""

    name: str
    class_name: str
    train: torch.Tensor
    held_out: torch.Tensor


def subject_views(
    name: str, work: Path, size_px: int, n_train: int = 5, n_held_out: int = 12, seed: int = 0
) -> Views:
    """Draws the views of the held-out emoji `name`.

    Args:
        name: a key of concepts.toml's held_out.
        work: folder that holds, or will hold, the emoji packages.
        size_px: side of the pictures.
        n_train: views to learn from.
        n_held_out: views to measure against.
        seed: of backgrounds and placements.

    Raises:
        ValueError: `name` is not held out.
    """
    table = concept_lists()["held_out"]
    if name not in table:
        raise ValueError(f"{name!r} is not a held-out emoji; choose from: {', '.join(table)}")
    frames = _frames(name, table[name], work, n_train + n_held_out)
    random = Random(f"{name}-{seed}")
    scenes = random.sample([*SCENES, *(f"on a {c} background" for c in COLOURS)], len(SCENES) + 12)
    # Interleave: both halves cover the whole animation without sharing a frame.
    chosen = {"train": [], "held_out": list(range(len(frames)))}
    for i in range(n_train):
        frame = int(i * len(frames) / n_train)
        chosen["train"].append(frame)
        chosen["held_out"].remove(frame)
    where = {"train": scenes[:n_train], "held_out": scenes[n_train:]}
    parts = {}
    for part, indices in chosen.items():
        concepts = [frames[i] for i in indices]
        places = [where[part][i % len(where[part])] for i in range(len(concepts))]
        parts[part] = _compose(concepts, places, size_px, random)
    return Views(name, table[name], parts["train"], parts["held_out"])


def _frames(name: str, class_name: str, work: Path, n: int) -> list[Concept]:
    """`n` pictures of the subject: frames of its animation, or its still picture `n` times."""
    path = animated_path(name, work)
    if path is None:
        still = still_path(name, work)
        if still is None:
            raise ValueError(f"there is no picture of {name!r}")
        return [Concept(name, name, class_name, still)] * n
    with Image.open(path) as image:
        total = getattr(image, "n_frames", 1)
    steps = np.linspace(0, total - 1, n).round().astype(int)
    return [Concept(name, name, class_name, path, int(frame)) for frame in steps]


def _compose(concepts: list[Concept], where: list[str], size_px: int, random: Random):
    compositor = Compositor(concepts, size_px, backgrounds=1)
    drawn = [torch.from_numpy(draw_background(size_px, random, w)[0]) for w in where]
    compositor.backgrounds = torch.stack(drawn)
    placements = [Placement.draw(random) for _ in concepts]
    index = list(range(len(concepts)))
    return compositor.render(index, index, placements)


def write_views(images: torch.Tensor, folder: Path) -> list[Path]:
    """Writes uint8 pictures (N, 3, S, S) as 01.jpg, 02.jpg, … and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(to_pil(images), start=1):
        paths.append(folder / f"{i:02d}.jpg")
        image.save(paths[-1], quality=92)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Writes training and held-out views of one subject."""
    from nora_diffusion.mini.__main__ import PRESETS, default_work_folder

    parser = argparse.ArgumentParser(prog="python -m nora_diffusion.mini.subjects")
    parser.add_argument("name", choices=tuple(concept_lists()["held_out"]))
    parser.add_argument("out", type=Path)
    parser.add_argument("--size-px", type=int, default=256)
    parser.add_argument("--work", type=Path, default=default_work_folder() / PRESETS["cpu"].name)
    args = parser.parse_args(argv)
    views = subject_views(args.name, args.work, args.size_px)
    write_views(views.train, args.out)
    print(f"wrote {len(views.train)} views of a {views.class_name}, {views.name}, to {args.out}")


if __name__ == "__main__":
    main()
