"""Is a subject learnt on mini? Eight held-out emoji, three seeds, mini's prompts.

    python benchmarks/subject.py [--base mini-128] [--subjects N | --names NAME ...] [--seeds N]
        [--set train.steps=300 ...] [--name RESULT] [--picture FILE]

Each run trains on five views and is measured on pictures of `sample_data/prompts.txt` by
EffNet-Lite2 features against twelve *held-out* views (those of mini-128 made 64 px small, so that
both bases are measured by one ruler):

* gap closed: (adapted - base) / (ceiling - base), all mean cosines to the held-out views; the
  ceiling is what real composites of the subject on the prompts' backgrounds reach;
* nearest is subject: share of pictures whose nearest emoji of all is the subject;
* background: share of pictures whose background is the one the prompt names, before and after;
* class drift: how far pictures of the class *without* the trigger word moved (1 - cosine to the
  base's pictures of the same seeds) and how much nearer to the subject.

With `--runs DIR` finished runs are kept there and not repeated; rows are saved as they come.
`--picture` is a sheet of all subjects: a photo, the base's picture and five of the adapted ones.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from _common import write_result
from PIL import Image

from nora_diffusion.bench.ruler import PHOTO_PX, TRIGGER, WHERE_OF, Drawn, Ruler, to_tensor
from nora_diffusion.config import DreamboothConfig, load_config, load_run
from nora_diffusion.evaluation.image_features import NAME, to_pil
from nora_diffusion.evaluation.prompts import MINI
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder
from nora_diffusion.mini.score import contact_sheet as sheet_of_tensors
from nora_diffusion.mini.subjects import SUBJECTS, Views, subject_views, write_views
from nora_diffusion.sampling import load_adapted
from nora_diffusion.sheets import contact_sheet
from nora_diffusion.train.dreambooth import run

SHOWN = (1, 2, 3, 4, 6)
"""Prompts of the sheet of all subjects: beach, snow, night sky, wooden table, city."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="mini", choices=("mini", "mini-128"))
    parser.add_argument("--sampling-steps", type=int, default=25, help="of every picture")
    parser.add_argument("--no-drift", action="store_true", help="draw nothing without the trigger")
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS))
    parser.add_argument("--names", nargs="*", help="other held-out emoji, to choose settings on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config override")
    parser.add_argument("--work", type=Path, default=default_work_folder() / PRESETS["cpu"].name)
    parser.add_argument("--runs", type=Path, help="keep the run folders here")
    parser.add_argument("--name", default="subject", help="of the result file")
    parser.add_argument("--picture", type=Path, help="write a sheet of all subjects here")
    args = parser.parse_args()
    overrides = [part for pair in args.set for part in ("--" + pair).split("=", 1)]
    ruler = Ruler(args.work, args.sampling_steps, base=args.base)
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        rows, shown = [], {}
        for name in args.names or SUBJECTS[: args.subjects]:
            views = subject_views(name, args.work, PHOTO_PX)
            for seed in range(args.seeds):
                folder = runs / f"{name.replace(' ', '-')}-{seed}"
                run_folder = train_once(args.base, views, folder, seed, overrides)
                found, drawn = measure(ruler, views, run_folder, seed, not args.no_drift)
                rows.append(found)
                shown.setdefault(name, [to_pil(views.train)[0], *chosen(drawn)])
                print(json.dumps(rows[-1]), flush=True)
                summary = summarise(rows)
                result = {
                    "backend": NAME,
                    "base": f"{args.base} {ruler.base_hash}",
                    "sampling_steps": args.sampling_steps,
                    "prompts": len(MINI),
                    "overrides": args.set,
                    "summary": summary,
                    "rows": rows,
                }
                write_result(args.name, result)
    print(json.dumps(summary, indent=2))
    if args.picture is not None:
        heads = ["a photo", "the base", *(WHERE_OF[i] for i in SHOWN)]
        contact_sheet([*shown.values()], [*shown], heads, tile_px=128).save(args.picture)


def chosen(drawn: Drawn) -> list[Image.Image]:
    """What the sheet of all subjects shows of one: the base's picture first."""
    return [drawn.base[SHOWN[0]], *(drawn.adapted[i] for i in SHOWN)]


def train_once(base: str, views: Views, folder: Path, seed: int, overrides: list[str]) -> Path:
    """Trains one subject with one seed, by the base's config, unless `folder` holds the run."""
    photos = folder.with_name(folder.name + "-photos")
    config: DreamboothConfig = load_config(
        base,
        [
            "--data.subject", str(photos), "--data.class_name", views.class_name,
            "--data.trigger", TRIGGER, "--train.seed", str(seed), "--output.dir", str(folder),
            *overrides,
        ],
    )  # fmt: skip
    if folder.exists():
        kept = load_run(folder)
        parts = ("adapter", "text_encoder", "train")
        if any(getattr(kept, part) != getattr(config, part) for part in parts):
            raise SystemExit(
                f"{folder}: was trained with other settings; remove it, or other --runs"
            )
        if (folder / "adapter.safetensors").exists():
            return folder
    write_views(views.train, photos)
    return run(config, resume=folder.exists())


def measure(ruler: Ruler, views: Views, folder: Path, seed: int, drift: bool) -> tuple[dict, Drawn]:
    """Scores one finished run, and leaves a sheet of its pictures in its folder."""
    adapted = load_adapted(folder, device="cpu", dtype="fp32")
    drawn = ruler.draw(adapted, views, seed, drift)
    rows = (drawn.base, drawn.adapted, drawn.without_trigger)
    sheet_of_tensors(
        torch.cat([to_tensor(row) for row in rows if row is not None]),
        [
            f"{who} {p}"
            for who in ("base:", "adapted:", "no trigger:")[: 2 + drift]
            for p in WHERE_OF
        ],
        folder / "sheet.png",
        columns=len(WHERE_OF),
    )
    found = ruler.score(drawn, views, seed)
    return {"subject": views.name, "class": views.class_name, "seed": seed, **found}, drawn


def summarise(rows: list[dict]) -> dict:
    """Means over all runs of every number in the rows."""
    keys = [k for k, v in rows[0].items() if isinstance(v, float)]
    return {"runs": len(rows), **{k: statistics.mean(r[k] for r in rows) for k in keys}}


if __name__ == "__main__":
    main()
