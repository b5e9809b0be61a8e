"""``nora bench multi``: several subjects in one NoRA, in one each, and in ones that are blended."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.bench.methods import SPLIT
from nora_diffusion.bench.ruler import PHOTO_PX, Ruler
from nora_diffusion.bench.trial import method_config, open_session
from nora_diffusion.denoiser_hooks import load_adapter
from nora_diffusion.families import load_family
from nora_diffusion.families.base import Family
from nora_diffusion.mini.subjects import Views, subject_views, write_views
from nora_diffusion.train import adapters
from nora_diffusion.train.dreambooth import train

TRIGGERS = ("sks", "zwx")
PAIRS = (("hibiscus", "poodle"), ("tropical fish", "racing car"))
METHOD, RATE = SPLIT, 2e-2

Row = dict[str, Any]


@dataclass(frozen=True)
class MultiPlan:
    """How much is run.

    Attributes:
        steps: for each subject: one adapter of two subjects trains twice as long.
        pairs: of subjects that go together.
        seeds: of trainings and pictures.
    """

    steps: int
    pairs: tuple[tuple[str, ...], ...] = PAIRS
    seeds: tuple[int, ...] = (0, 1)


def run_multi(
    plan: MultiPlan, ruler: Ruler, adapters_folder: Path, rows: list[Row],
    save: Callable[[list[Row]], None],
) -> list[Row]:  # fmt: skip
    """Measure every subject three ways, as far as it has not been.

    Args:
        plan: how much.
        ruler: what measures.
        adapters_folder: where trained adapters are kept.
        rows: those of an earlier call; added to.
        save: called with all rows after every new one.
    """
    done = {(row["how"], row["pair"], row["subject"], row["seed"]) for row in rows}
    for seed in plan.seeds:
        for pair in plan.pairs:
            name = " + ".join(pair)
            for how in ("separate", "together", "blended"):
                if all((how, name, subject, seed) in done for subject in pair):
                    continue
                views = [subject_views(subject, ruler.work, PHOTO_PX) for subject in pair]
                files = _files(plan, how, views, seed, adapters_folder, ruler.device)
                for index, (one, trigger) in enumerate(zip(views, TRIGGERS, strict=True)):
                    if (how, name, one.name, seed) in done:
                        continue
                    used = files if how != "separate" else files[index : index + 1]
                    adapted = _adapted(used, ruler.device)
                    found = ruler.measure(adapted, one, seed, trigger)
                    of_row = {"how": how, "pair": name, "subject": one.name, "seed": seed}
                    rows.append({**of_row, **{k: round(v, 5) for k, v in found.items()}})
                    save(rows)
    return rows


def _files(
    plan: MultiPlan,
    how: str,
    views: Sequence[Views],
    seed: int,
    folder: Path,
    device: torch.device,
) -> list[Path]:
    """The adapters of a pair: one of both subjects, or one each."""
    if how == "together":
        return [_trained(plan, views, TRIGGERS, seed, folder, device)]
    return [
        _trained(plan, [one], [trigger], seed, folder, device)
        for one, trigger in zip(views, TRIGGERS, strict=True)
    ]


def _trained(
    plan: MultiPlan,
    views: Sequence[Views],
    triggers: Sequence[str],
    seed: int,
    folder: Path,
    device: torch.device,
) -> Path:
    name = "+".join(one.name.replace(" ", "-") for one in views)
    trained_by = METHOD.name.replace("/", "-").replace(", ", "-").replace(" ", "-")
    path = folder / f"{name}-{trained_by}-{RATE:g}-{plan.steps}-{seed}.safetensors"
    if path.is_file():
        return path
    steps = plan.steps * len(views)
    with tempfile.TemporaryDirectory() as temporary:
        tables: list[str] = []
        for index, (one, trigger) in enumerate(zip(views, triggers, strict=True)):
            photos = Path(temporary) / f"photos-{index}"
            write_views(one.train, photos)
            tables.append(
                f'{{path = "{photos}", class_name = "{one.class_name}", trigger = "{trigger}"}}'
            )
        given = [
            "data.subject=none",
            "data.class_name=none",
            f"data.subjects=[{', '.join(tables)}]",
        ]
        cfg = method_config(METHOD, RATE, steps, seed, Path(temporary), given)
        session = open_session(cfg, METHOD, Path(temporary), device)
        train(session)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"base": "mini", "steps": steps}
        pipeline = session.family.components.pipeline
        return save_adapter(pipeline, path, adapters.NAME, metadata=about)


def _adapted(files: Sequence[Path], device: torch.device) -> Family:
    """The base with these adapters, each at its full weight."""
    family = load_family("mini", dtype=torch.float32, device=device)
    for index, file in enumerate(files):
        load_adapter(family.components.pipeline, file, f"subject_{index}")
    return family
