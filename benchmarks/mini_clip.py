"""Does mini-CLIP find the caption of a picture and the picture of a caption?

    python benchmarks/mini_clip.py [--clip FOLDER] [--drawn N]

* retrieval among 200 composites: 100 seen emoji, each on 2 backgrounds; the same with backgrounds
  that training never put them on (mostly plain colours: each scene was soon drawn with each
  emoji); 40 never-shown emoji, each on 5. A wrong background is as wrong as a wrong emoji;
* the mini-CLIP score of what mini draws from N prompts, between its floor (the prompts of other
  pictures) and its ceiling (real composites of the same prompts).
"""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from _common import write_result
from diffusers import StableDiffusionPipeline

from nora_diffusion.evaluation.image_features import to_pil
from nora_diffusion.evaluation.text_alignment import (
    MINI_CLIP,
    image_features,
    retrieval,
    text_features,
)
from nora_diffusion.mini.__main__ import ASSETS, PRESETS, default_work_folder
from nora_diffusion.mini.clip import shown_pairs
from nora_diffusion.mini.gallery import WHERE, real_composites
from nora_diffusion.mini.score import draw, prompts_for
from nora_diffusion.mini.sources import Concept, concepts, held_out

SIZE_PX = 64
RECIPE = PRESETS["cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=MINI_CLIP)
    parser.add_argument("--drawn", type=int, default=100)
    parser.add_argument("--work", type=Path, default=default_work_folder() / RECIPE.name)
    args = parser.parse_args()
    seen, never = concepts(args.work, RECIPE.clip_concept_set), held_out(args.work)
    about = json.loads((args.clip / "mini_clip.json").read_text(encoding="utf-8"))
    steps = about["recipe"]["samples"] // RECIPE.clip_batch_size
    shown = shown_pairs(args.work, SIZE_PX, steps, RECIPE.clip_concept_set, RECIPE.clip_batch_size)
    results = {
        "model": about,
        "seen_emoji": score(args.clip, pairs(seen, 100, 2, set())),
        "seen_emoji_on_unseen_combinations": score(args.clip, pairs(seen, 100, 2, shown)),
        "never_shown_emoji": score(args.clip, pairs(never, 40, 5, set())),
        "drawn_by_mini": alignment(args.clip, args.work, args.drawn),
    }
    print(write_result("mini_clip", results))
    print(results)


def pairs(
    members: list[Concept], emoji: int, places: int, shown: set[tuple[str, str]]
) -> list[tuple[Concept, str]]:
    """`emoji` of `members`, each with `places` backgrounds that `shown` does not pair it with."""
    free = {c: [where for where in WHERE if (c.name, where) not in shown] for c in members}
    able, random = [c for c in members if len(free[c]) >= places], Random(20)
    chosen = random.sample(able, emoji)
    return [(c, where) for c in chosen for where in random.sample(free[c], places)]


def score(clip: Path, chosen: list[tuple[Concept, str]]) -> dict[str, float]:
    members, where = [c for c, _ in chosen], [w for _, w in chosen]
    images = real_composites(members, where, SIZE_PX, seed=21)
    texts = text_features([f"a photo of a {c.noun} {w}" for c, w in chosen], clip)
    return {"composites": len(chosen)} | retrieval(image_features(to_pil(images), clip), texts)


def alignment(clip: Path, work: Path, n: int) -> dict[str, float]:
    """Mean mini-CLIP score of `n` pictures by mini, of real ones, and of pictures interchanged."""
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS, dtype=torch.float32)
    chosen = prompts_for(concepts(work, RECIPE.concept_set), n)
    prompts = [f"a photo of a {c.noun} {w}" for c, w in chosen]
    texts = text_features(prompts, clip)
    real = real_composites([c for c, _ in chosen], [w for _, w in chosen], SIZE_PX, seed=22)
    drawn = image_features(to_pil(draw(pipeline, prompts)), clip)
    ceiling = image_features(to_pil(real), clip)
    return {
        "pictures": n,
        "floor_of_other_prompts": float((drawn * texts.roll(1, 0)).sum(1).mean()),
        "drawn": float((drawn * texts).sum(1).mean()),
        "real_composites": float((ceiling * texts).sum(1).mean()),
    }


if __name__ == "__main__":
    main()
