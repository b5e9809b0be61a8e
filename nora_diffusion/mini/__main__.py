r"""Train, export and score mini: ``python -m nora_diffusion.mini [train|export|score|all|clip]``.

Every stage continues from its last checkpoint in the work folder, on the CPU or on CUDA::

    python -m nora_diffusion.mini all                    # 64 px, ~3 h on 2 cores
    python -m nora_diffusion.mini train export --preset gpu --minutes 7.5 \
        --start nora_diffusion/assets/mini --out FOLDER  # 128 px, goes on from the shipped weights
    python -m nora_diffusion.mini score --photos FOLDER   # of the shipped weights
    python -m nora_diffusion.mini clip                   # mini-CLIP, on top of the shipped mini
"""

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nora_diffusion.cores import spin_briefly
from nora_diffusion.mini.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from nora_diffusion.mini.start import Start

ASSETS = Path(__file__).parents[1] / "assets" / "mini"
SHIPPED = {"cpu": ASSETS, "gpu": ASSETS.with_name("mini-128")}
"""Where the result of each preset is part of the package."""
CLIP_ASSETS = ASSETS.with_name("mini_clip")


def default_work_folder() -> Path:
    """Returns ``$NORA_MINI_WORK`` or ``~/.cache/nora-mini``."""
    return Path(os.environ.get("NORA_MINI_WORK", Path.home() / ".cache" / "nora-mini"))


def main(argv: list[str] | None = None) -> None:
    """Runs the stages named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nora_diffusion.mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=("train", "export", "score", "all", "clip"))
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument(
        "--work",
        type=Path,
        default=default_work_folder(),
        help="work folder for packages and checkpoints",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="an exported mini to go on from: its weights, tokenizer and autoencoder",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="end the denoiser's training, learning rate and all, after this time at the latest",
    )
    parser.add_argument("--batch-size", type=int, help="of the denoiser, instead of the preset's")
    parser.add_argument(
        "--out", type=Path, help="where export writes; default: the package's assets"
    )
    parser.add_argument("--photos", type=Path, help="real photos for the autoencoder's PSNR")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="train the UNet compiled")
    args = parser.parse_args(argv)
    spin_briefly(os.environ)  # before torch is imported

    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: must be above 0")
    if args.batch_size is not None and args.batch_size <= 0:
        parser.error(f"--batch-size {args.batch_size}: must be above 0")

    import torch

    recipe = PRESETS[args.preset]
    if args.batch_size is not None:
        recipe = replace(recipe, batch_size=args.batch_size)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stages = {"train", "export", "score"} if "all" in args.stages else set(args.stages)
    work = args.work / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    out = args.out or SHIPPED[args.preset]
    if stages & {"train", "export"}:
        from nora_diffusion.mini.start import adopt

        try:
            start = adopt(args.start, work)
        except ValueError as error:
            parser.error(str(error))
        if start is None and not recipe.autoencoder_samples:
            parser.error(f"--preset {args.preset} goes on from a mini: name it with --start")
        _train_and_export(recipe, work, out, device, stages, start, args.minutes, args.compile)
    if "score" in stages:
        from nora_diffusion.mini.score import score

        result = score(out, work, work / "score", recipe.concept_set, photos=args.photos)
        print(json.dumps(result, indent=2))
    if "clip" in stages:
        _clip(recipe, work, args.out or CLIP_ASSETS, device)


def _train_and_export(
    recipe: Recipe,
    work: Path,
    out: Path,
    device: str,
    stages: set[str],
    start: "Start | None",
    minutes: float | None,
    compiled: bool,
) -> None:
    """Trains what is missing; without "train" takes the denoiser as far as it is."""
    from nora_diffusion.mini.autoencoder import train_autoencoder
    from nora_diffusion.mini.compose import Compositor, to_signed
    from nora_diffusion.mini.decoder import train_decoder
    from nora_diffusion.mini.denoiser import train_denoiser
    from nora_diffusion.mini.export import build_pipeline, export, set_latent_scale
    from nora_diffusion.mini.sources import concepts

    size_px = recipe.size_px
    if start is None:
        autoencoder = train_autoencoder(work, size_px, recipe.autoencoder_samples, device)
        autoencoder = train_decoder(work, autoencoder, size_px, recipe.decoder_samples, device)
    else:
        # Its denoiser reads the latents of no other.
        autoencoder = start.autoencoder()
    seen = concepts(work, recipe.concept_set)
    images, _, _ = Compositor(seen, size_px, backgrounds=300, seed=3).sample(512, seed=3)
    autoencoder.to(device)  # pyright: ignore[reportArgumentType]
    set_latent_scale(autoencoder, to_signed(images).to(device))
    further = "train" in stages
    done = train_denoiser(work, autoencoder, recipe, device, start, minutes, further, compiled)
    if "export" in stages:
        pipeline = build_pipeline(autoencoder, done.model, done.tokenizer)
        about = asdict(recipe) | {
            "denoiser_samples": done.samples,
            "denoiser_minutes": round(done.seconds / 60, 1),
        }
        if start is not None:
            about |= {"autoencoder_samples": 0, "decoder_samples": 0, "start": start.about}
        digest = export(pipeline, out, recipe.name, about, work / "manifests")
        print(f"wrote {recipe.name} ({digest[:16]}) after {done.steps} denoiser steps to {out}")


def _clip(recipe: Recipe, work: Path, out: Path, device: str) -> None:
    """Trains what is missing of mini-CLIP on the shipped mini's text encoder and exports it."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from nora_diffusion.mini.clip import export_clip, train_clip

    text_encoder = CLIPTextModel.from_pretrained(ASSETS / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    model, steps = train_clip(
        work,
        text_encoder,
        tokenizer,
        recipe.size_px,
        recipe.clip_samples,
        device,
        recipe.clip_concept_set,
        recipe.clip_batch_size,
    )
    about = {"samples": steps * recipe.clip_batch_size, "concept_set": recipe.clip_concept_set}
    digest = export_clip(model, tokenizer, out, about, work / "manifests" / "clip.txt")
    print(f"wrote mini-CLIP ({digest[:16]}) after {steps} steps to {out}")


if __name__ == "__main__":
    main()
