"""The score of a mini: does it draw what the prompt names, and how well does it decode?"""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageOps

from nora_diffusion.evaluation.image_features import NAME, image_features, to_pil
from nora_diffusion.mini.compose import to_signed
from nora_diffusion.mini.gallery import WHERE, BackgroundProbe, Gallery, real_composites
from nora_diffusion.mini.sources import Concept, concepts, held_out

STEPS, GUIDANCE = 25, 4.0


def prompts_for(concept_list: list[Concept], n: int, seed: int = 11) -> list[tuple[Concept, str]]:
    """Draws `n` (concept, background) pairs; every concept comes before any comes twice."""
    random = Random(seed)
    rounds = math.ceil(n / len(concept_list))
    order = [c for _ in range(rounds) for c in random.sample(concept_list, len(concept_list))]
    return [(c, WHERE[i % len(WHERE)]) for i, c in enumerate(order[:n])]


@torch.no_grad()
def draw(pipeline: Any, prompts: list[str], batch_size: int = 25, seed: int = 0) -> torch.Tensor:
    """Draws one picture a prompt: uint8 (N, 3, S, S). A picture depends on its own seed alone."""
    pipeline.set_progress_bar_config(disable=True)
    out = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images = pipeline(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        out.append((images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(out)


@torch.no_grad()
def psnr(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> float:
    """Mean PSNR in dB of uint8 pictures (N, 3, S, S) through the autoencoder."""
    dtype, vae = pipeline.vae.dtype, pipeline.vae
    values = []
    for batch in images.split(50):
        signed = to_signed(batch)
        output = vae.decode(vae.encode(signed.to(dtype)).latents).sample.float().clamp(-1, 1)
        mse = ((output - signed) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())


def photo_tensor(folder: Path, size_px: int) -> torch.Tensor:
    """Every .jpg below `folder`, cropped to a square: uint8 (N, 3, size_px, size_px)."""
    crops = []
    for path in sorted(folder.rglob("*.jpg")):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        crop = ImageOps.fit(image, (size_px, size_px), Image.Resampling.LANCZOS)
        crops.append(torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8))
    return torch.stack(crops).view(-1, size_px, size_px, 3).permute(0, 3, 1, 2)


def score(
    folder: Path,
    work: Path,
    out: Path,
    concept_set: str = "common",
    n: int = 200,
    photos: Path | None = None,
) -> dict:
    """Scores the pipeline in `folder` and writes ``score.json`` and a contact sheet to `out`.

    Args:
        folder: a mini as exported.
        work: the recipe's work folder (pictures, gallery cache).
        out: where the results go.
        concept_set: the concepts it was trained on.
        n: number of prompts.
        photos: a folder of real photos for the autoencoder's PSNR; left out if None or missing.

    Returns:
        The scores, as written.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    size_px = pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor
    pairs = prompts_for(concepts(work, concept_set), n)
    where = [w for _, w in pairs]
    names = [c.name for c, _ in pairs]
    gallery, probe = Gallery.build(work, size_px), BackgroundProbe.build(work, size_px)
    drawn = draw(pipeline, [f"a photo of a {c.noun} {w}" for c, w in pairs])
    nonsense = draw(pipeline, [f"a photo of a sks {c.noun} {w}" for c, w in pairs])
    real = real_composites([c for c, _ in pairs], where, size_px, seed=12)
    result = {
        "model": json.loads((folder / "mini.json").read_text()),
        "prompts": n,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "backend": NAME,
        "gallery": len(gallery.names),
    }
    for key, images in (("real", real), ("drawn", drawn), ("drawn_with_nonsense_word", nonsense)):
        nearest = gallery.nearest(image_features(to_pil(images)))
        found = probe.names(images)
        result[key] = {
            "top1": sum(a == b[0] for a, b in zip(names, nearest, strict=True)) / n,
            "top5": sum(a in b for a, b in zip(names, nearest, strict=True)) / n,
            "background": sum(a == b for a, b in zip(where, found, strict=True)) / n,
        }
    held = [c for c in held_out(work) for _ in range(3)]
    places = [WHERE[i % len(WHERE)] for i in range(len(held))]
    result["psnr_held_out_emoji_db"] = psnr(pipeline, real_composites(held, places, size_px, 13))
    if photos is not None and photos.is_dir():
        result["psnr_real_photos_db"] = psnr(pipeline, photo_tensor(photos, size_px))
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(drawn[:96], [f"{c.noun} {w}" for c, w in pairs[:96]], out / "sheet.png")
    (out / "score.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def contact_sheet(images: torch.Tensor, labels: list[str], path: Path, columns: int = 12) -> None:
    """Writes uint8 pictures (N, 3, S, S) as a grid with a line of text under each."""
    cell, line = max(96, images.shape[-1]), 22
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + line + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(to_pil(images), labels, strict=True)):
        x, y = i % columns * (cell + 4), i // columns * (cell + line + 4)
        sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        for k in range(2):
            pen.text((x, y + cell + 10 * k), label[k * 17 : (k + 1) * 17], fill="black")
    sheet.save(path)
