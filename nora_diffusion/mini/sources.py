"""The pictures mini learns from: Fluent Emoji 3D and its animated frames, with Unicode's names.

The packages are fetched once with ``npm pack`` into the work folder. Held-out emoji are filtered
here, at the only place where pictures enter a training run; every run also writes the list of
what it did see (`write_manifest`), which a test compares with the held-out list.
"""

import json
import subprocess
import tarfile
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@lobehub/fluent-emoji-anim-1": "1.0.0",
    "unicode-emoji-json": "0.9.0",
}
COMMON_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")


@dataclass(frozen=True)
class Concept:
    """One emoji: its Unicode `name`, the `noun` that captions say, its class word and its file.

    `frame` chooses a picture of an animated file.
    """

    name: str
    noun: str
    class_name: str
    path: Path
    frame: int = 0


@cache
def concept_lists() -> dict:
    """Returns concepts.toml: few, held_out, held_out_variants, classes and spoken."""
    return tomllib.loads((Path(__file__).parent / "concepts.toml").read_text(encoding="utf-8"))


def is_held_out(name: str) -> bool:
    """Tells whether an emoji called `name`, in any skin tone or variant, is held out."""
    lists = concept_lists()
    stem = name.split(":")[0].strip()
    variants = {v for group in lists["held_out_variants"].values() for v in group}
    return stem in lists["held_out"] or stem in variants


def fetch(package: str, work: Path) -> Path:
    """Returns the unpacked folder of an npm package, fetching it with ``npm pack`` if missing.

    Raises:
        RuntimeError: npm is missing or could not fetch the package.
    """
    folder = work / "packages" / package.replace("/", "-").lstrip("@")
    if not (folder / ".complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # several trainings may start at once
            if not (folder / ".complete").exists():
                _fetch_into(folder, f"{package}@{PACKAGES[package]}")
    return folder / "package"


def _fetch_into(folder: Path, spec: str) -> None:
    command = ["npm", "pack", "--pack-destination", str(folder), spec]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"npm is needed to fetch {spec}; install Node.js") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"npm could not fetch {spec}: {error.stderr.strip()}") from error
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (folder / ".complete").touch()


@cache
def _codes(work: Path) -> dict[str, tuple[str, str]]:
    """Maps an emoji's name to (code points in the files' spelling, group)."""
    folder = fetch("unicode-emoji-json", work)
    table = json.loads((folder / "data-by-emoji.json").read_text(encoding="utf-8"))
    return {
        entry["name"]: ("-".join(f"{ord(c):x}" for c in emoji), entry["group"])
        for emoji, entry in table.items()
    }


def _file_of(folder: Path, code: str) -> Path | None:
    candidates = (code, code.replace("-fe0f", ""))
    return next((p for c in candidates if (p := folder / "assets" / f"{c}.webp").exists()), None)


def still_path(name: str, work: Path) -> Path | None:
    """Returns the file of the still 3D picture called `name`, or None."""
    return _file_of(fetch("@lobehub/fluent-emoji-3d", work), _codes(work)[name][0])


def animated_path(name: str, work: Path) -> Path | None:
    """Returns the file of the animation called `name`, or None."""
    return _file_of(fetch("@lobehub/fluent-emoji-anim-1", work), _codes(work)[name][0])


def concepts(work: Path, size: str = "common") -> list[Concept]:
    """Returns the training concepts, held-out ones excluded, in a fixed order.

    Args:
        work: the recipe's work folder.
        size: "few" (the list of that name in concepts.toml), "common" (its classes), "full" (those
            and every other animal, food, place, activity and object) or "everything" (flags, faces
            and people too; for the autoencoder, which needs no names).

    Raises:
        ValueError: a name in concepts.toml has no picture, or is held out.
    """
    lists = concept_lists()
    spoken = lists["spoken"]
    class_of = {name: cls for cls, names in lists["classes"].items() for name in names}
    chosen = lists["few"] if size == "few" else list(class_of)
    if size not in ("few", "common"):
        groups = COMMON_GROUPS if size == "full" else None
        for name, (_, group) in _codes(work).items():
            if name not in class_of and (groups is None or group in groups):
                chosen.append(name)
    found = []
    for name in chosen:
        if is_held_out(name):
            if name in class_of:
                raise ValueError(f"concepts.toml lists {name!r} both as held out and in classes")
            continue
        path = still_path(name, work)
        if path is None:
            if name in class_of:
                raise ValueError(f"concepts.toml names {name!r}, which has no 3D picture")
            continue
        noun = spoken.get(name, name.lower().replace("’", "'"))
        found.append(Concept(name, noun, class_of.get(name, noun), path))
    return found


def held_out(work: Path) -> list[Concept]:
    """Returns the held-out concepts with their class words, for evaluation only."""
    table = concept_lists()["held_out"]
    paths = {name: still_path(name, work) for name in table}
    return [Concept(n, n, cls, p) for n, cls in table.items() if (p := paths[n]) is not None]


def write_manifest(seen: list[Concept], path: Path) -> None:
    """Writes the names of every emoji a training stage drew from, one a line.

    Names that are there already stay: the weights may go on from a run that saw others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = dict.fromkeys([*before, *(c.name for c in seen)])
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def rgba(path: Path, size_px: int, frame: int = 0) -> np.ndarray:
    """Reads one frame as premultiplied float32 RGBA in [0, 1], shape (4, size_px, size_px)."""
    with Image.open(path) as image:
        image.seek(frame)
        # Premultiply before resizing: otherwise colours of transparent pixels bleed into edges.
        pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    channels = [
        np.asarray(Image.fromarray(pixels[..., c]).resize((size_px, size_px), Image.Resampling.BOX))
        for c in range(4)
    ]
    return np.stack(channels).clip(0, 1)
