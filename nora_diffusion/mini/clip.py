"""mini-CLIP: pictures and captions in one space, a `CLIPModel` trained on mini's composites.

It shares mini's tokenizer and starts from the first layers of mini's text encoder. It is a ruler
for pictures that mini draws, and a base for adapters; the held-out emoji are kept from it too.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from nora_diffusion.mini.backgrounds import draw_background
from nora_diffusion.mini.compose import Compositor, Placement, wording
from nora_diffusion.mini.export import forget_origin, weights_hash
from nora_diffusion.mini.sources import concepts, write_manifest
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state

NAME = "mini-clip-64-v1"
WIDTH, TEXT_LAYERS, VISION_LAYERS, PATCH_PX = 192, 2, 5, 16
MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SAVE_EVERY = 50  # steps
_BACKGROUNDS, _SEED = 3000, 4
_CLASS_WORD, _NO_PLACE, _BLURRED = 0.15, 0.1, 0.25  # shares of captions and of pictures


def build_clip(size_px: int, text_encoder: CLIPTextModel) -> CLIPModel:
    """Returns an untrained vision tower beside the first layers of a trained text encoder."""
    text = text_encoder.config.to_dict() | {"num_hidden_layers": TEXT_LAYERS}
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=WIDTH // 32,
        image_size=size_px,
        patch_size=PATCH_PX,
    )
    config = CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    kept = set(model.text_model.state_dict())
    weights = {k: v for k, v in text_encoder.state_dict().items() if k in kept}
    model.text_model.load_state_dict(weights)
    return model


@dataclass(frozen=True)
class Batch:
    """Pictures, captions and which caption is true of which picture.

    Attributes:
        images: uint8 (N, 3, S, S).
        captions: N texts; the caption of the same index was written for the picture.
        truth: bool (N, N), row = picture, column = caption.
    """

    images: torch.Tensor
    captions: list[str]
    truth: torch.Tensor


def draw_batch(compositor: Compositor, size: int, seed: int) -> Batch:
    """Draws `size` composites in squares of two emoji by two backgrounds: hard negatives.

    Every picture has a neighbour with the same emoji on another background and one with another
    emoji on the same background, so that neither half of a caption can be left unread.
    """
    random = Random(seed)
    which, behind = _squares(len(compositor.concepts), compositor.phrases, size, random)
    placements = [_placement(random) for _ in which]
    said = []
    for w, b, p in zip(which, behind, placements, strict=True):
        concept = compositor.concepts[w]
        word = concept.class_name if random.random() < _CLASS_WORD else concept.noun
        place = None if random.random() < _NO_PLACE else compositor.phrases[b]
        text = wording(word, p.scale, random)
        said.append((word, place, text if place is None else f"{text} {place}"))
    truth = [
        [
            word in (compositor.concepts[w].noun, compositor.concepts[w].class_name)
            and place in (None, compositor.phrases[b])
            for word, place, _ in said
        ]
        for w, b in zip(which, behind, strict=True)
    ]
    images = compositor.render(which, behind, placements)
    return Batch(_blur(images, random), [text for _, _, text in said], torch.tensor(truth))


def _squares(
    n_concepts: int, phrases: list[str], size: int, random: Random
) -> tuple[list[int], list[int]]:
    """Indices of `size` emoji and backgrounds: two emoji on the same two backgrounds, and so on."""
    order = random.sample(range(n_concepts), size // 2)
    which, behind = [], []
    for first, second in zip(order[::2], order[1::2], strict=True):
        a, b = _two_places(phrases, random)
        which += [first, first, second, second]
        behind += [a, b, a, b]
    return which, behind


def _two_places(phrases: list[str], random: Random) -> tuple[int, int]:
    while True:
        a, b = random.randrange(len(phrases)), random.randrange(len(phrases))
        if phrases[a] != phrases[b]:
            return a, b


def _placement(random: Random) -> Placement:
    """Wider than what mini is shown: what mini draws is not always where it should be."""
    x, y, angle = (random.uniform(-0.1, 0.1) for _ in range(3))
    return Placement(random.uniform(0.65, 0.95), x, y, angle, flip=False)


def _blur(images: torch.Tensor, random: Random) -> torch.Tensor:
    """Halves the resolution of some pictures: mini's own are soft."""
    chosen = torch.tensor([random.random() < _BLURRED for _ in images])
    soft = F.interpolate(F.avg_pool2d(images[chosen].float(), 2), scale_factor=2, mode="bilinear")
    out = images.clone()
    out[chosen] = soft.round().to(torch.uint8)
    return out


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (N, 3, S, S) -> what the vision tower takes, as its image processor does."""
    mean, deviation = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, DEVIATION)
    )
    return (images.float() / 255 - mean) / deviation


def contrastive_loss(model: CLIPModel, batch: Batch, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Cross-entropy both ways, its mass shared among all that is true (UniCL, arXiv 2204.03610)."""
    device = model.logit_scale.device
    tokens = tokenizer(batch.captions, padding=True, truncation=True, return_tensors="pt").to(
        device
    )
    output = model(
        input_ids=tokens.input_ids,  # causal and read at its end token: padding needs no mask
        pixel_values=normalise(batch.images.to(device)),
    )
    truth = batch.truth.to(device).float()
    loss = F.cross_entropy(output.logits_per_image, truth / truth.sum(1, keepdim=True))
    return (loss + F.cross_entropy(output.logits_per_text, (truth / truth.sum(0)).T)) / 2


def train_clip(
    work: Path,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    size_px: int,
    samples: int,
    device: str,
    concept_set: str = "full",
    batch_size: int = 96,
    learning_rate: float = 1e-3,
    further: bool = True,
) -> tuple[CLIPModel, int]:
    """Trains, or continues, mini-CLIP for `samples` pictures.

    Args:
        work: work folder; the state is ``work/clip.safetensors``.
        text_encoder: mini's, trained; its first layers are the start of the text tower.
        tokenizer: mini's.
        size_px: side of the pictures.
        samples: length of the whole run, the part already done included.
        device: "cpu" or "cuda".
        concept_set: which emoji, see `sources.concepts`.
        batch_size: pictures a step, a multiple of 4.
        learning_rate: peak of the cosine.
        further: False takes the model as far as it has been trained.

    Returns:
        The averaged model in float32, in eval mode, and the steps it has taken.
    """
    state_path = work / "clip.safetensors"
    torch.manual_seed(0)
    model = build_clip(size_px, text_encoder).to(device)  # pyright: ignore[reportArgumentType]
    trained = Trained(model, learning_rate, ema_decay=0.997, weight_decay=0.05)
    if state_path.exists():
        tensors, progress = load_state(state_path)
        trained.restore(tensors, progress["step"])
    total = samples // batch_size
    if further and trained.step < total:
        seen = concepts(work, concept_set)
        write_manifest(seen, work / "manifests" / "clip.txt")
        compositor = Compositor(seen, size_px, _BACKGROUNDS, device, _SEED)
        begin, losses = time.perf_counter(), []
        while trained.step < total:
            batch = draw_batch(compositor, batch_size, _seed_of(trained.step))
            loss = contrastive_loss(model, batch, tokenizer)
            loss.backward()
            trained.update(learning_rate_at(trained.step, total, learning_rate, warmup=100))
            model.logit_scale.data.clamp_(max=4.6052)  # CLIP's limit: a scale of 100
            losses.append(float(loss.detach()))
            if trained.step % SAVE_EVERY == 0 or trained.step == total:
                rate = len(losses) * batch_size / (time.perf_counter() - begin)
                mean = sum(losses) / len(losses)
                print(
                    f"clip step {trained.step}/{total} loss {mean:.3f} {rate:.0f} samples/s",
                    flush=True,
                )
                save_state(state_path, trained.tensors(), {"step": trained.step})
                begin, losses = time.perf_counter(), []
    trained.use_average()
    return model.eval(), trained.step


def _seed_of(step: int) -> int:
    return _SEED * 1_000_000 + step


def shown_pairs(
    work: Path, size_px: int, steps: int, concept_set: str, batch_size: int
) -> set[tuple[str, str]]:
    """The (emoji, background) pairs that `steps` steps of training have put together.

    They are drawn again from the same seeds, in less than a minute.
    """
    seen = concepts(work, concept_set)
    random = Random(_SEED)
    phrases = [draw_background(size_px, random)[1] for _ in range(_BACKGROUNDS)]
    pairs = set()
    for step in range(steps):
        indices = _squares(len(seen), phrases, batch_size, Random(_seed_of(step)))
        pairs |= {(seen[w].name, phrases[b]) for w, b in zip(*indices, strict=True)}
    return pairs


def export_clip(
    model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path, recipe: dict, manifest: Path
) -> str:
    """Writes model (fp16), processor, ``mini_clip.json`` and the list of emoji it was shown.

    Returns:
        The hash of the weights.
    """
    vision: Any = model.config.vision_config
    size_px = vision.image_size
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size_px},
            crop_size={"height": size_px, "width": size_px},
            image_mean=MEAN,
            image_std=DEVIATION,
        ),
        tokenizer=tokenizer,
    )
    model.half().save_pretrained(folder)
    # transformers loads in the dtype that a config records: a CPU wants float32.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    forget_origin(path)
    processor.save_pretrained(folder)
    (folder / "manifests").mkdir(exist_ok=True)
    shutil.copy(manifest, folder / "manifests" / "clip.txt")
    digest = weights_hash(folder)
    about = {"name": NAME, "hash": digest, "recipe": recipe}
    (folder / "mini_clip.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return digest
