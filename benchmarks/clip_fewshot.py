"""Never-shown emoji as new classes for mini-CLIP: zero-shot, LoRA and NoRA from k pictures of each.

    python benchmarks/clip_fewshot.py [--shots K ...] [--seeds N]

Classes are the emoji that no model of this project was ever shown. A picture is a frame of the
emoji's animation (its still where it has none) on its own background; training and test pictures
share no frame of an animation and no background. Every method gets the same pictures, steps and
batches, and its learning rate from the same number of tries on *other* classes that mini-CLIP was
never shown either (faces, people, flags), so that the test classes choose nothing. NoRA's inner
rank is 6: as many trained parameters as LoRA r 2.

Rows are saved as they come; the same command again goes on.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
from _common import RESULTS, write_result
from tqdm import tqdm

from nora_diffusion.data.class_folders import Pool, choose_shots, read_classes
from nora_diffusion.evaluation.fewshot_table import Row, summary, table
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder
from nora_diffusion.mini.compose import Compositor, Placement
from nora_diffusion.mini.sources import concept_lists, concepts
from nora_diffusion.mini.subjects import subject_views, write_views
from nora_diffusion.run_config import load_config
from nora_diffusion.train.clip_base import ClipBase, load_clip_base
from nora_diffusion.train.clip_fewshot import Method, accuracy, methods, train_one
from nora_diffusion.vision_language_config import VisionLanguageConfig

SIZE_PX, TRAIN, TEST = 64, 16, 16
GRID = {
    "NoRA": (3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA r 2": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA r 16": (3e-4, 1e-3, 3e-3, 1e-2),
}
TUNING_CLASSES, TUNING_SHOTS, TUNING_SEED = 40, 4, 7
NAME = "clip_fewshot"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=default_work_folder() / PRESETS["cpu"].name)
    args = parser.parse_args()
    base = load_clip_base("mini_clip", torch.float32, torch.device("cpu"))
    folder = args.work / "fewshot"
    config = settings(folder)
    about = {
        "classes": "held-out emoji of concepts.toml",
        "steps": f"{config.train.steps_per_shot} a shot, {config.train.steps} at most",
        "batch_size": config.train.batch_size,
    }
    state = restore(about)
    chosen = tune(config, base, args.work, folder, state, about)
    draw_classes(args.work, folder)
    train, test = (read_classes(folder / p, p, base.prepare) for p in ("train", "test"))
    about |= {"number_of_classes": len(train.classes), "test_pictures": len(test.labels)}
    prompts = prompt_ids(config, base, train)
    zero_shot = accuracy(base, prompts, test)
    rows = [Row(**row) for row in state["rows"]]
    finished = {(row.method, row.shots, row.seed) for row in rows}
    for seed in range(args.seeds):
        for shots in args.shots:
            few = choose_shots(train, shots, seed)
            for method in chosen:
                if (method.name, shots, seed) in finished:
                    continue
                row, _ = train_one(config, base, method, few, test, prompts, shots, seed)
                print(f"{row.method}, {shots} shots, seed {seed}: {row.accuracy:.1%}", flush=True)
                rows.append(row)
                state |= {"rows": [asdict(r) for r in rows], "summary": summary(rows)}
                save(about | {"zero_shot": zero_shot}, state)
    print(table(zero_shot, rows))


def settings(folder: Path) -> VisionLanguageConfig:
    """The shipped config, with as many trained parameters as LoRA r 2."""
    given = [f"few_shot.images={folder / 'train'}", "adapter.inner_r=6"]
    given += ["train.steps=60", "train.steps_per_shot=15", "train.batch_size=16"]
    return load_config(VisionLanguageConfig, NAME, given)


def restore(about: dict) -> dict:
    """What an earlier call of the same settings finished."""
    path = RESULTS / f"{NAME}.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if about.items() <= results.items():
            return {key: results[key] for key in ("tuning", "rows")}
    return {"tuning": [], "rows": []}


def save(about: dict, state: dict) -> None:
    write_result(NAME, about | state)


def prompt_ids(config: VisionLanguageConfig, base: ClipBase, pool: Pool) -> torch.Tensor:
    return base.tokenise([config.few_shot.template.format(name) for name in pool.classes])


def draw_classes(work: Path, folder: Path) -> None:
    """Writes the pictures of the held-out emoji, a subfolder each, once."""
    for name in tqdm(concept_lists()["held_out"], desc="classes", unit="emoji"):
        if (folder / "test" / name / f"{TEST:02d}.jpg").exists():
            continue
        views = subject_views(name, work, SIZE_PX, TRAIN, TEST)
        write_views(views.train, folder / "train" / name)
        write_views(views.held_out, folder / "test" / name)


def tune(
    config: VisionLanguageConfig,
    base: ClipBase,
    work: Path,
    folder: Path,
    state: dict,
    about: dict,
) -> list[Method]:
    """Each method with the learning rate that was best on classes that are not tested on."""
    pool, test = other_classes(work, folder, base)
    prompts = prompt_ids(config, base, pool)
    few = choose_shots(pool, TUNING_SHOTS, TUNING_SEED)
    tries = {(t["method"], t["learning_rate"]): t["accuracy"] for t in state["tuning"]}
    chosen = []
    for method in methods(config, base):
        for rate in GRID[method.name]:
            if (method.name, rate) in tries:
                continue
            tried = replace(method, learning_rate=rate)
            row, _ = train_one(config, base, tried, few, test, prompts, TUNING_SHOTS, TUNING_SEED)
            print(f"tuning: {method.name} at {rate:g}: {row.accuracy:.1%}", flush=True)
            tries[method.name, rate] = row.accuracy
            state["tuning"].append(
                {"method": method.name, "learning_rate": rate, "accuracy": row.accuracy}
            )
            save(about, state)
        best = max(GRID[method.name], key=lambda rate: tries[method.name, rate])
        chosen.append(replace(method, learning_rate=best))
    return chosen


def other_classes(work: Path, folder: Path, base: ClipBase) -> tuple[Pool, Pool]:
    """Composites of emoji that mini-CLIP was not shown and that are not held out."""
    out = {"train": folder / "tuning-train", "test": folder / "tuning-test"}
    if not (folder / "tuning.done").exists():
        shown = {c.name for c in concepts(work, PRESETS["cpu"].clip_concept_set)}
        random = Random(30)
        free = [
            c for c in concepts(work, "everything") if c.name not in shown and ":" not in c.name
        ]
        members = random.sample(free, TUNING_CLASSES)
        compositor = Compositor(members, SIZE_PX, backgrounds=400, seed=31)
        for part in ("train", "test"):
            for i, concept in enumerate(members):
                behind = [random.randrange(400) for _ in range(8)]
                placed = [Placement.draw(random) for _ in behind]
                images = compositor.render([i] * 8, behind, placed)
                write_views(images, out[part] / concept.noun.replace("/", " "))
        (folder / "tuning.done").touch()
    pools = [read_classes(out[part], part, base.prepare) for part in ("train", "test")]
    return pools[0], pools[1]


if __name__ == "__main__":
    main()
