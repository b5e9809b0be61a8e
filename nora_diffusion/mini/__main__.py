"""Train, export and score mini: ``python -m nora_diffusion.mini [train|export|score|all|clip]``.

Every stage continues from its last checkpoint in the work folder, on the CPU or on CUDA::

    python -m nora_diffusion.mini all                    # 64 px, common emoji, ~3 h on 2 cores
    python -m nora_diffusion.mini all --preset gpu        # 128 px, full set
    python -m nora_diffusion.mini score --photos FOLDER   # of the shipped weights
    python -m nora_diffusion.mini clip                   # mini-CLIP, on top of the shipped mini
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets" / "mini"
CLIP_ASSETS = ASSETS.with_name("mini_clip")


@dataclass(frozen=True)
class Recipe:
    """What one version of mini is trained on, and for how long."""

    name: str
    size_px: int
    concept_set: str
    autoencoder_samples: int
    decoder_samples: int
    denoiser_samples: int
    batch_size: int
    clip_samples: int
    clip_concept_set: str
    clip_batch_size: int


PRESETS = {
    "cpu": Recipe("mini-64-v3", 64, "few", 120_000, 48_000, 480_000, 32, 100_000, "full", 96),
    "gpu": Recipe(
        "mini-128-v1", 128, "full", 1_500_000, 500_000, 6_000_000, 512, 3_000_000, "full", 1024
    ),
}


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
    parser.add_argument("stage", choices=("train", "export", "score", "all", "clip"))
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument(
        "--work",
        type=Path,
        default=default_work_folder(),
        help="work folder for packages and checkpoints",
    )
    parser.add_argument(
        "--out", type=Path, help="where export writes; default: the package's assets"
    )
    parser.add_argument("--photos", type=Path, help="real photos for the autoencoder's PSNR")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="train the UNet compiled")
    args = parser.parse_args(argv)

    import torch

    recipe = PRESETS[args.preset]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = args.work / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    if args.stage == "clip":
        _clip(recipe, work, args.out or CLIP_ASSETS, device)
        return
    out = args.out or ASSETS
    if args.stage in ("train", "export", "all"):
        _train_and_export(recipe, work, out, device, args.stage, args.compile)
    if args.stage in ("score", "all"):
        from nora_diffusion.mini.score import score

        result = score(out, work, work / "score", recipe.concept_set, photos=args.photos)
        print(json.dumps(result, indent=2))


def _train_and_export(
    recipe: Recipe, work: Path, out: Path, device: str, stage: str, compiled: bool
) -> None:
    """Trains what is missing; "export" takes the denoiser as far as it is."""
    from nora_diffusion.mini.autoencoder import train_autoencoder
    from nora_diffusion.mini.compose import Compositor, to_signed
    from nora_diffusion.mini.decoder import train_decoder
    from nora_diffusion.mini.denoiser import train_denoiser
    from nora_diffusion.mini.export import build_pipeline, export, set_latent_scale
    from nora_diffusion.mini.sources import concepts

    autoencoder = train_autoencoder(work, recipe.size_px, recipe.autoencoder_samples, device)
    autoencoder = train_decoder(work, autoencoder, recipe.size_px, recipe.decoder_samples, device)
    seen = concepts(work, recipe.concept_set)
    images, _, _ = Compositor(seen, recipe.size_px, backgrounds=300, seed=3).sample(512, seed=3)
    autoencoder.to(device)  # pyright: ignore[reportArgumentType]
    set_latent_scale(autoencoder, to_signed(images).to(device))
    model, tokenizer, steps = train_denoiser(
        work,
        autoencoder,
        recipe.size_px,
        recipe.denoiser_samples,
        device,
        recipe.concept_set,
        recipe.batch_size,
        further=stage != "export",
        compiled=compiled,
    )
    if stage != "train":
        pipeline = build_pipeline(autoencoder, model, tokenizer)
        about = asdict(recipe) | {"denoiser_samples": steps * recipe.batch_size}
        digest = export(pipeline, out, recipe.name, about, work / "manifests")
        print(f"wrote {recipe.name} ({digest[:16]}) after {steps} denoiser steps to {out}")


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
