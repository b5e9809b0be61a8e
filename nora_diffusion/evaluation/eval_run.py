"""``nora eval``: the DreamBooth protocol on a finished run.

25 prompts, n pictures each, by the base and by the adapter, with the trigger word and without it.
Pictures are kept in the output folder, and a stopped evaluation goes on with those it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from nora_diffusion.adapter.files import adapter_info
from nora_diffusion.adapter.switch import switched_off
from nora_diffusion.config import RUN_CONFIG, UserError, fill_prompt, load_run
from nora_diffusion.data.images import Photo, read_image, read_photos
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.backends import load_backend
from nora_diffusion.evaluation.eval_report import write_report
from nora_diffusion.evaluation.prompts import PROMPTS, without_trigger
from nora_diffusion.evaluation.protocol import Pictures, measure
from nora_diffusion.families import built_in_version
from nora_diffusion.families.base import Family, resolve_device
from nora_diffusion.run_folder import check_out
from nora_diffusion.sampling import (
    adapter_path,
    load_adapted,
    sample_prompts,
    sample_settings,
    save_png,
    shown_base,
)

SETTINGS = "settings.json"
LIVE_CLASSES = frozenset(
    "bear bird boy cat child cow dog duck fish girl hamster horse kitten man parrot person "
    "puppy rabbit woman".split()
)
PICTURES_TOGETHER = 16  # drawn before they are saved
KINDS = ("base", "adapted", "base_class", "adapted_class")


@dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    Attributes:
        source: run folder or adapter file.
        out: folder for pictures and report.
        prompts: "mini", "object", "live", or a file of one prompt a line; None: mini's for mini,
            else by the class.
        photos: folder of the training photos; None: those of the run.
        held_out: folder of other photos of the subject.
        backends: names as ``load_backend`` takes them; none: those that ship for mini, else DINO
            and CLIP.
        n: pictures a prompt.
        seed: of the first picture of each prompt.
        steps: denoising steps; None: the run's own.
        guidance: None: the run's own.
        base: None: the one the adapter was trained on.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", "fp32", "bf16" or "fp16".
        trigger: of the subject, where the run has several; None: the first.
    """

    source: Path
    out: Path
    prompts: str | None = None
    photos: Path | None = None
    held_out: Path | None = None
    backends: tuple[str, ...] = ()
    n: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    base: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trigger: str | None = None


def evaluate_run(options: Options) -> Path:
    """Draw, measure and report.

    Returns:
        The HTML page; ``eval.json`` and ``eval.md`` lie beside it.

    Raises:
        UserError: when adapter, photos, prompts or a backend cannot be had, a held-out photo is a
            training photo, or the folder holds an evaluation with other settings or cannot be
            written.
        AdapterFileError: when the adapter does not fit the base.
    """
    path = adapter_path(options.source)
    check_out(options.out)
    info = adapter_info(path)
    trigger, class_name = _subject(info, path, options.trigger)
    base = options.base or info["base"] or ""
    prompts = read_prompts(options.prompts or default_prompts(base, class_name))
    trained_on = _photos(options.photos or _run_photos(path, trigger), "--photos")
    others = [] if options.held_out is None else _photos(options.held_out, "--held-out")
    _check_held_out(others, trained_on)
    training, held_out = ([read_image(p.path) for p in found] for found in (trained_on, others))
    device = resolve_device(options.device)
    offline, online = ("effnet", "mini_clip"), ("dino", "clip")
    names = options.backends or (offline if built_in_version(base) else online)
    backends = [load_backend(name, device) for name in names]
    of_run = sample_settings(path)
    settings = {
        "adapter": info["checksum"],
        "base": shown_base(base),
        "base_hash": info["metadata"].get("base_hash"),
        "trigger": trigger,
        "class_name": class_name,
        "prompts": prompts,
        "n": options.n,
        "seed": options.seed,
        "steps": options.steps or int(of_run.get("steps", 25)),
        "guidance": options.guidance
        if options.guidance is not None
        else float(of_run.get("guidance", 5.0)),
    }
    _open_folder(options.out, settings)
    _draw(options, settings)
    pictures = _read_pictures(options.out, settings, training, held_out)
    results = {
        **{key: value for key, value in settings.items() if key != "prompts"},
        "prompts": len(prompts),
        "training_photos": len(training),
        "held_out_photos": len(held_out),
        "backends": [measure(pictures, backend) for backend in backends],
    }
    write_atomically(options.out / "eval.json", (json.dumps(results, indent=2) + "\n").encode())
    return write_report(options.out, results, prompts, _picture_names(settings))


def default_prompts(base: str, class_name: str) -> str:
    """The kind of prompts that suits a base and a class."""
    if built_in_version(base):
        return "mini"
    return "live" if class_name.split()[-1].lower() in LIVE_CLASSES else "object"


def read_prompts(source: str) -> list[str]:
    """The prompts of a kind of subject, or of a file.

    Raises:
        UserError: when the file is missing, or a prompt lacks a placeholder.
    """
    if source in PROMPTS:
        return list(PROMPTS[source])
    path = Path(source).expanduser()
    if not path.is_file():
        kinds = ", ".join(PROMPTS)
        raise UserError(f"--prompts {source}: is neither {kinds} nor a file of one prompt a line")
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if line]
    for prompt in found:
        for place in ("{trigger}", "{class_name}"):
            if place not in prompt:
                raise UserError(f"--prompts {source}: {prompt!r} holds no {place}")
    if not found:
        raise UserError(f"--prompts {source}: holds no prompt")
    return found


def _subject(info: dict[str, Any], path: Path, wanted: str | None) -> tuple[str, str]:
    """Trigger word and class: those wanted, or the first the adapter names."""
    first = {"trigger": info.get("trigger"), "class_name": info.get("class_name")}
    named = {one["trigger"]: one["class_name"] for one in info["metadata"].get("subjects", [first])}
    if wanted is not None and wanted not in named:
        known = ", ".join(str(trigger) for trigger in named)
        raise UserError(f"--trigger {wanted}: {path} was trained on {known}")
    trigger = wanted or first["trigger"]
    class_name = named.get(trigger)
    if not trigger or not class_name:
        raise UserError(
            f"{path}: does not name its trigger word and class, so it was not written by "
            "nora-dreambooth and cannot be evaluated"
        )
    return trigger, class_name


def _run_photos(path: Path, trigger: str) -> Path:
    if not (path.parent / RUN_CONFIG).is_file():
        raise UserError(
            f"{path}: stands alone, without the run that tells where its photos are; give them "
            "with --photos FOLDER"
        )
    subjects = load_run(path.parent).data.each()
    return Path(next(one.path for one in subjects if one.trigger == trigger))


def _photos(folder: Path, key: str) -> list[Photo]:
    return read_photos(folder, key, limit=None)[0]


def _check_held_out(held_out: Sequence[Photo], training: Sequence[Photo]) -> None:
    """Refuse photos that would make held-out scores scores on the training photos.

    Raises:
        UserError: naming them.
    """
    known = {photo.digest: photo.path for photo in training}
    if same := [photo for photo in held_out if photo.digest in known]:
        named = ", ".join(f"{p.path.name} ({known[p.digest]})" for p in same[:8])
        more = f" and {len(same) - 8} more" if len(same) > 8 else ""
        raise UserError(
            f"--held-out {same[0].path.parent}: {len(same)} of its {len(held_out)} photos are "
            f"training photos: {named}{more}; give photos that were not trained on"
        )


def _open_folder(out: Path, settings: dict[str, Any]) -> None:
    file = out / SETTINGS
    if file.is_file():
        if json.loads(file.read_bytes()) != settings:
            raise UserError(
                f"--out {out}: holds pictures of another adapter or other settings; give another "
                "folder, or remove it"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty, and holds no evaluation; give another folder")
    write_atomically(file, json.dumps(settings, indent=2).encode())


def _picture_names(settings: dict[str, Any]) -> dict[str, list[list[str]]]:
    """For each kind and prompt the files of its pictures."""
    seeds = range(settings["seed"], settings["seed"] + settings["n"])
    return {
        kind: [
            [f"pictures/{kind}/{row:02d}-seed{seed}.png" for seed in seeds]
            for row in range(len(settings["prompts"]))
        ]
        for kind in KINDS
    }


def _draw(options: Options, settings: dict[str, Any]) -> None:
    """Every picture that is not there yet."""
    names, out = _picture_names(settings), options.out
    missing = {
        kind: [row for row, files in enumerate(rows) if not all((out / f).is_file() for f in files)]
        for kind, rows in names.items()
    }
    total = sum(map(len, missing.values()))
    if not total:
        return
    family = load_adapted(
        options.source, base=options.base, device=options.device, dtype=options.dtype
    )
    together = max(1, PICTURES_TOGETHER // settings["n"])
    with tqdm(total=total, desc="drawing", unit="prompt") as bar:
        for kind, rows in missing.items():
            for start in range(0, len(rows), together):
                chunk = rows[start : start + together]
                drawn = _draw_rows(family, kind, [settings["prompts"][r] for r in chunk], settings)
                for row, images in zip(chunk, drawn, strict=True):
                    for file, image in zip(names[kind][row], images, strict=True):
                        save_png(image, out / file, {"adapter": settings["adapter"], "kind": kind})
                bar.update(len(chunk))


def _draw_rows(
    family: Family, kind: str, prompts: Sequence[str], settings: dict[str, Any]
) -> list[list[Image.Image]]:
    """A row of pictures for each prompt."""
    trigger, class_name = settings["trigger"], settings["class_name"]
    texts = [
        without_trigger(prompt, class_name)
        if kind.endswith("_class")
        else fill_prompt(prompt, trigger, class_name)
        for prompt in prompts
    ]
    seeds = range(settings["seed"], settings["seed"] + settings["n"])
    parts = family.components
    models = () if kind.startswith("adapted") else (parts.denoiser, *parts.text_encoders.values())
    with switched_off(*models):
        return sample_prompts(
            family, texts, seeds, steps=settings["steps"], guidance=settings["guidance"]
        )


def _read_pictures(
    out: Path,
    settings: dict[str, Any],
    training: Sequence[Image.Image],
    held_out: Sequence[Image.Image],
) -> Pictures:
    rows = {
        kind: [[Image.open(out / file).convert("RGB") for file in files] for files in of_kind]
        for kind, of_kind in _picture_names(settings).items()
    }
    class_name = settings["class_name"]
    plain = [without_trigger(prompt, class_name) for prompt in settings["prompts"]]
    return Pictures(**rows, training=training, held_out=held_out, class_prompts=plain)
