"""What a training learns of its photos, and what of that holds for other views of the subject.

    python benchmarks/held_out.py [--subjects dragon poodle] [--workers 2]

On mini, 100 steps by the recipe's own loop: the share of the base's loss that is gone on the
photos (with noise that the training did not see), and on twelve views with other backgrounds,
places and frames. No picture is drawn, so a row is cheap and steady; every method is trained at
all of its learning rates. What is in ``benchmarks/results/held_out.json`` is not trained again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, write_result
from tqdm import tqdm

from nora_diffusion.bench.methods import (
    FEED_FORWARD,
    LORA_FEED_FORWARD,
    SPLIT,
    WIDER,
    WIDEST,
    lora,
    nora,
    only,
)
from nora_diffusion.bench.parallel import side_by_side
from nora_diffusion.bench.ruler import BASE_HASH, PHOTO_PX
from nora_diffusion.bench.trial import Trial, open_session, trial_config
from nora_diffusion.config import DreamboothConfig
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder
from nora_diffusion.mini.subjects import subject_views, write_views
from nora_diffusion.train.adapters import subject_loss
from nora_diffusion.train.common import TrainingDiverged
from nora_diffusion.train.dreambooth import train
from nora_diffusion.train.inputs import Inputs, encode_inputs
from nora_diffusion.train.session import Session

STEPS = 100
MEASURED = 24  # batches a loss is averaged over
FRESH = 5000  # number of the first of them: far from any that a start is fitted to
KINDS = ("attention", "feed_forward")

METHODS = (
    *(lora(f"LoRA r {r}", r) for r in (1, 2, 16)),
    SPLIT,
    WIDER,
    WIDEST,
    nora(64, 4, basis="gradient", init="gradient", text_basis="random"),
    FEED_FORWARD,
    LORA_FEED_FORWARD[0],
    *(only(kind, method) for kind in KINDS for method in (WIDER, lora("LoRA r 1", 1))),
)


@torch.no_grad()
def mean_loss(cfg: DreamboothConfig, session: Session, inputs: Inputs) -> float:
    """The subject's loss on some pictures, always with the same noise."""
    batches = range(FRESH, FRESH + MEASURED)
    losses = (subject_loss(cfg, session.family, inputs, i, encode=True) for i in batches)
    return statistics.mean(map(float, losses))


def measure(wanted: Trial) -> dict[str, Any]:
    """Train once; the shares of the losses that are gone."""
    torch.set_num_threads(1)
    views = subject_views(wanted.subject, default_work_folder() / PRESETS["cpu"].name, PHOTO_PX)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = trial_config(wanted, views, folder)
        session = open_session(cfg, wanted.method, folder, torch.device("cpu"))
        write_views(views.held_out, folder / "held_out")
        data = cfg.data.model_copy(update={"subject": str(folder / "held_out")})
        others = cfg.model_copy(update={"data": data})
        held_out = encode_inputs(others, session.family, session.report)
        sets = {"photos": (cfg, session.inputs), "held_out": (others, held_out)}
        before = {key: mean_loss(own, session, inputs) for key, (own, inputs) in sets.items()}
        try:
            train(session)
        except TrainingDiverged:
            return {**wanted.key, "diverged": True, "photos": 0.0, "held_out": 0.0}
        after = {key: mean_loss(own, session, inputs) for key, (own, inputs) in sets.items()}
    trained = sum(parameter.numel() for parameter in session.parameters.values())
    learnt = {key: round(1 - after[key] / before[key], 4) for key in sets}
    return {**wanted.key, "trained_parameters": trained, **learnt}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over subjects by method and rate, and the rate at which most held."""
    lines = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method.name]
        if not own:
            continue
        rates = sorted({row["learning_rate"] for row in own})
        means = {
            f"{rate:g}": {
                key: round(
                    statistics.mean(row[key] for row in own if row["learning_rate"] == rate), 4
                )
                for key in ("photos", "held_out")
            }
            for rate in rates
        }
        best = max(means, key=lambda rate: means[rate]["held_out"])
        trained = next((row["trained_parameters"] for row in own if "trained_parameters" in row), 0)
        line = {"method": method.name, "trained_parameters": trained, "rates": means}
        lines.append({**line, "best_rate": best, **means[best]})
    return sorted(lines, key=lambda line: -line["held_out"])


def main() -> None:
    """Measure what is missing and write the result after every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--subjects", nargs="+", default=["dragon", "green apple", "basketball", "poodle"]
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    about = {"base": f"mini {BASE_HASH}", "steps": STEPS, "subjects": args.subjects}
    path = RESULTS / "held_out.json"
    there = json.loads(path.read_bytes())["results"] if path.is_file() else {}
    rows = there["rows"] if there.get("about") == about else []
    trials = [
        Trial(method, subject, rate, 0, STEPS)
        for method in METHODS
        for rate in method.rates
        for subject in args.subjects
    ]
    known = [{key: row[key] for key in trials[0].key} for row in rows]
    left = [trial for trial in trials if trial.key not in known]

    def save() -> None:
        write_result("held_out", {"about": about, "summary": summarise(rows), "rows": rows})

    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(left), unit="training") as bar:

        def finished(_: Trial, row: dict[str, Any]) -> None:
            rows.append(row)
            bar.update()
            save()

        side_by_side(pool, args.workers, measure, left, finished)
    save()


if __name__ == "__main__":
    main()
