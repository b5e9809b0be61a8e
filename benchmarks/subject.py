"""Does `nora-dreambooth mini` learn a subject? Eight held-out emoji, three seeds, mini's prompts.

    python benchmarks/subject.py [--subjects N | --names NAME ...] [--seeds N]
        [--set train.steps=300 ...] [--name RESULT]

Each run trains on five views and is measured on pictures of `sample_data/prompts.txt` by
EffNet-Lite2 features against twelve *held-out* views:

* gap closed: (adapted - base) / (ceiling - base), all mean cosines to the held-out views; the
  ceiling is what real composites of the subject on the prompts' backgrounds reach;
* nearest is subject: share of pictures whose nearest emoji of all is the subject;
* background: share of pictures whose background is the one the prompt names, before and after;
* class drift: how far pictures of the class *without* the trigger word moved (1 - cosine to the
  base's pictures of the same seeds) and how much nearer to the subject.

Finished runs are kept in the work folder and not repeated; rows are saved as they come.
"""

import argparse
import json
import statistics
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import torch
from _common import write_result
from PIL import Image

from nora_diffusion.config import DreamboothConfig, fill_prompt, load_config
from nora_diffusion.evaluation.image_features import (
    NAME,
    image_features,
    mean_pairwise_cosine,
    to_pil,
)
from nora_diffusion.families import load_family
from nora_diffusion.mini.__main__ import ASSETS, PRESETS, default_work_folder
from nora_diffusion.mini.gallery import WHERE, BackgroundProbe, Gallery
from nora_diffusion.mini.score import contact_sheet
from nora_diffusion.mini.subjects import SUBJECTS, Views, subject_views, write_views
from nora_diffusion.sampling import load_adapted, sample_prompts
from nora_diffusion.train.dreambooth import run

ROOT = Path(__file__).parents[1]
PROMPTS = (ROOT / "sample_data" / "prompts.txt").read_text(encoding="utf-8").splitlines()
SIZE_PX, PHOTO_PX, TRIGGER = 64, 256, "sks"
GUIDANCE = float(tomllib.loads((ROOT / "configs" / "mini.toml").read_text())["sample"]["guidance"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS))
    parser.add_argument("--names", nargs="*", help="other held-out emoji, to choose settings on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config override")
    parser.add_argument("--work", type=Path, default=default_work_folder() / PRESETS["cpu"].name)
    parser.add_argument("--runs", type=Path, help="keep the run folders here")
    parser.add_argument("--name", default="subject", help="of the result file")
    args = parser.parse_args()
    overrides = [part for pair in args.set for part in ("--" + pair).split("=", 1)]
    base_hash = json.loads((ASSETS / "mini.json").read_text())["hash"]
    ruler = Ruler(args.work)
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        rows = []
        for name in args.names or SUBJECTS[: args.subjects]:
            views = subject_views(name, args.work, PHOTO_PX)
            for seed in range(args.seeds):
                folder = runs / f"{name.replace(' ', '-')}-{seed}"
                rows.append(ruler.measure(views, train_once(views, folder, seed, overrides), seed))
                print(json.dumps(rows[-1]), flush=True)
                summary = summarise(rows)
                result = {
                    "backend": NAME,
                    "base": base_hash,
                    "prompts": len(PROMPTS),
                    "overrides": args.set,
                    "summary": summary,
                    "rows": rows,
                }
                write_result(args.name, result)
    print(json.dumps(summary, indent=2))


def train_once(views: Views, folder: Path, seed: int, overrides: list[str]) -> Path:
    """Trains one subject with one seed unless `folder` holds the finished run."""
    if (folder / "adapter.safetensors").exists():
        return folder
    photos = folder.with_name(folder.name + "-photos")
    write_views(views.train, photos)
    config: DreamboothConfig = load_config(
        "mini",
        [
            "--data.subject", str(photos), "--data.class_name", views.class_name,
            "--data.trigger", TRIGGER, "--train.seed", str(seed), "--output.dir", str(folder),
            *overrides,
        ],
    )  # fmt: skip
    return run(config, resume=folder.exists())


class Ruler:
    """The base's pictures, the gallery and the background probe, shared by all runs."""

    def __init__(self, work: Path):
        self.work = work
        self.base = load_family("mini", dtype=torch.float32, device=torch.device("cpu"))
        self.gallery, self.probe = Gallery(work, SIZE_PX), BackgroundProbe(work, SIZE_PX)
        self.cache: dict = {}

    def measure(self, views: Views, folder: Path, seed: int) -> dict:
        """Scores one finished run."""
        adapted = load_adapted(folder, device="cpu", dtype="fp32")
        kind = views.class_name
        with_trigger = [fill_prompt(p, TRIGGER, kind) for p in PROMPTS]
        without = [" ".join(fill_prompt(p, "", kind).split()) for p in PROMPTS]
        base, plain = self._of_base(with_trigger, seed), self._of_base(without, seed)
        drawn, drifted = pictures(adapted, with_trigger, seed), pictures(adapted, without, seed)
        contact_sheet(
            torch.cat([_tensor(base), _tensor(drawn), _tensor(drifted)]),
            [f"{who} {p}" for who in ("base:", "adapted:", "no trigger:") for p in WHERE_OF],
            folder / "sheet.png",
            columns=len(PROMPTS),
        )
        held = image_features(to_pil(_shrink(views.held_out)))
        real = subject_views(views.name, self.work, PHOTO_PX, 1, len(PROMPTS), seed=99).held_out
        features = {k: image_features(v) for k, v in (
            ("base", base), ("adapted", drawn), ("plain", plain), ("drifted", drifted),
            ("real", to_pil(_shrink(real))),
        )}  # fmt: skip
        to_held = {k: mean_pairwise_cosine(f, held) for k, f in features.items()}
        gap = (to_held["adapted"] - to_held["base"]) / (to_held["real"] - to_held["base"])
        moved = 1 - (features["plain"] * features["drifted"]).sum(1).mean()
        return {
            "subject": views.name, "class": kind, "seed": seed,
            "base": to_held["base"], "adapted": to_held["adapted"], "ceiling": to_held["real"],
            "gap_closed": gap,
            "nearest_is_subject": self._share(features["adapted"], views.name),
            "nearest_is_subject_base": self._share(features["base"], views.name),
            "nearest_is_subject_real": self._share(features["real"], views.name),
            "background_base": self._background(base),
            "background_adapted": self._background(drawn),
            "class_moved": float(moved),
            "class_nearer_to_subject": to_held["drifted"] - to_held["plain"],
        }  # fmt: skip

    def _of_base(self, prompts: list[str], seed: int) -> list[Image.Image]:
        key = (tuple(prompts), seed)
        if key not in self.cache:
            self.cache[key] = pictures(self.base, prompts, seed)
        return self.cache[key]

    def _share(self, features: torch.Tensor, name: str) -> float:
        found = self.gallery.nearest(features, 1)
        return sum(row[0] == name for row in found) / len(found)

    def _background(self, images: list[Image.Image]) -> float:
        """Share right among the prompts that name one background of the probe."""
        found = self.probe.names(_tensor(images))
        pairs = [(a, b) for a, b in zip(WHERE_OF, found, strict=True) if a in WHERE]
        return sum(a == b for a, b in pairs) / len(pairs)


WHERE_OF = [p.split("{class_name} ")[1] for p in PROMPTS]


def pictures(family, prompts: list[str], seed: int) -> list[Image.Image]:
    """One picture a prompt, all from the same seed, with the guidance of mini's config."""
    return [row[0] for row in sample_prompts(family, prompts, [seed], guidance=GUIDANCE)]


def _tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(
        0, 3, 1, 2
    )


def _shrink(images: torch.Tensor) -> torch.Tensor:
    """To mini's size: the ceiling must not profit from a resolution that mini cannot draw."""
    small = torch.nn.functional.interpolate(images.float(), (SIZE_PX, SIZE_PX), mode="area")
    return small.round().to(torch.uint8)


def summarise(rows: list[dict]) -> dict:
    """Means over all runs of every number in the rows."""
    keys = [k for k, v in rows[0].items() if isinstance(v, float)]
    return {"runs": len(rows), **{k: statistics.mean(r[k] for r in rows) for k in keys}}


if __name__ == "__main__":
    main()
