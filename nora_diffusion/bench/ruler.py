"""How well an adapter on mini draws a subject: fidelity, text alignment, drift of the class.

Everything is measured on pictures of mini's 25 prompts against *held-out* views of the subject, by
EffNet-Lite2 features. The base's own pictures of the same seeds, and real composites of the subject
on the prompts' backgrounds, are measured beside them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nora_diffusion.config import fill_prompt, shipped_configs
from nora_diffusion.evaluation.image_features import image_features, mean_pairwise_cosine, to_pil
from nora_diffusion.evaluation.prompts import MINI, without_trigger
from nora_diffusion.evaluation.text_alignment import mini_clip_score
from nora_diffusion.families import built_in_version, load_family
from nora_diffusion.families.base import Family
from nora_diffusion.mini.__main__ import ASSETS
from nora_diffusion.mini.gallery import WHERE, BackgroundProbe, Gallery
from nora_diffusion.mini.state import load_state, save_state
from nora_diffusion.mini.subjects import Views, subject_views
from nora_diffusion.sampling import sample_prompts

SIZE_PX, PHOTO_PX, TRIGGER = 64, 256, "sks"
WHERE_OF = tuple(prompt.split("{class_name} ")[1] for prompt in MINI)
BASE_HASH = json.loads((ASSETS / "mini.json").read_text())["hash"]

Numbers = dict[str, float]


@dataclass(frozen=True)
class Reference:
    """What a subject is measured against: features (N, 1280) of its real pictures.

    Attributes:
        held_out: views that nothing is trained on.
        train: those that are.
        real: composites of the subject on the backgrounds of the prompts.
    """

    held_out: Tensor
    train: Tensor
    real: Tensor


@dataclass(frozen=True)
class Drawn:
    """Pictures of one seed, one a prompt.

    Attributes:
        base: with the trigger word, by the base.
        adapted: with it, by the adapted one.
        without_trigger: of the class alone, by the adapted one; None where not drawn.
    """

    base: list[Image.Image]
    adapted: list[Image.Image]
    without_trigger: list[Image.Image] | None

    def at(self, size_px: int) -> Drawn:
        """The same pictures, larger ones made smaller."""
        alone = self.without_trigger
        return Drawn(
            _resized(self.base, size_px),
            _resized(self.adapted, size_px),
            None if alone is None else _resized(alone, size_px),
        )


class Ruler:
    """The base's pictures and the subjects' features, shared by all measurements.

    Args:
        work: work folder of mini's recipe: emoji packages, and what is kept here.
        steps: denoising steps of every picture.
        device: where pictures are drawn; they are scored on the CPU.
        base: the built-in base, which is also the name of its config. Pictures of a larger one are
            scored at mini's size.
    """

    def __init__(
        self,
        work: Path,
        steps: int = 25,
        device: str | torch.device = "cpu",
        base: str = "mini",
    ):
        self.work, self.steps, self.device = work, steps, torch.device(device)
        self.base = load_family(base, dtype=torch.float32, device=self.device)
        self.base_hash = built_in_version(base)["base_hash"]
        config = tomllib.loads(shipped_configs()[base].read_text())
        self.guidance = float(config["sample"]["guidance"])
        self.gallery, self.probe = Gallery.shipped(), BackgroundProbe.shipped()
        self._references: dict[str, Reference] = {}

    def measure(self, adapted: Family, views: Views, seed: int, trigger: str = TRIGGER) -> Numbers:
        """Draw with the trigger word and score; arguments of ``draw``, result of ``score``."""
        return self.score(self.draw(adapted, views, seed, False, trigger), views, seed)

    def draw(
        self,
        adapted: Family,
        views: Views,
        seed: int,
        drift: bool = True,
        trigger: str = TRIGGER,
    ) -> Drawn:
        """Draw with an adapted mini.

        Args:
            adapted: with the adapter on.
            views: of the subject it has learnt.
            seed: of the pictures, one a prompt.
            drift: also draw the class without the trigger word.
            trigger: word that stands for the subject.
        """
        name = views.class_name
        return Drawn(
            self._of_base(name, trigger, seed),
            self.pictures(adapted, name, seed, trigger),
            self.pictures(adapted, name, seed, None) if drift else None,
        )

    def score(self, drawn: Drawn, views: Views, seed: int) -> Numbers:
        """Score pictures of a subject.

        Args:
            drawn: by ``draw``.
            views: of the subject.
            seed: of the pictures.

        Returns:
            ``base``, ``adapted``, ``ceiling``: mean cosine to the held-out views of the base's
            pictures, the adapter's, and real composites; ``training``: of the adapter's to the
            views it was trained on; ``gap_closed``: (adapted - base) / (ceiling - base);
            ``nearest_is_subject``, also ``..._base`` and ``..._real``: share of pictures whose
            nearest emoji of all is the subject; ``background_base`` and ``background_adapted``:
            share whose background is the one named; ``text_base`` and ``text_adapted``: mini-CLIP
            score to the prompt without the trigger; where the class was drawn alone,
            ``class_moved``, 1 - cosine to the base's picture, and ``class_nearer_to_subject``.
        """
        reference = self._reference(views)
        drawn = drawn.at(SIZE_PX)
        of_base, of_adapter = image_features(drawn.base), image_features(drawn.adapted)
        cosine = {
            "base": mean_pairwise_cosine(of_base, reference.held_out),
            "adapted": mean_pairwise_cosine(of_adapter, reference.held_out),
            "ceiling": mean_pairwise_cosine(reference.real, reference.held_out),
        }
        plain = [without_trigger(prompt, views.class_name) for prompt in MINI]
        alone = drawn.without_trigger
        return {
            **cosine,
            "training": mean_pairwise_cosine(of_adapter, reference.train),
            "gap_closed": (cosine["adapted"] - cosine["base"])
            / (cosine["ceiling"] - cosine["base"]),
            "nearest_is_subject": self._share(of_adapter, views.name),
            "nearest_is_subject_base": self._share(of_base, views.name),
            "nearest_is_subject_real": self._share(reference.real, views.name),
            "background_base": self._background(drawn.base),
            "background_adapted": self._background(drawn.adapted),
            "text_base": float(mini_clip_score(drawn.base, plain).mean()),
            "text_adapted": float(mini_clip_score(drawn.adapted, plain).mean()),
            **({} if alone is None else self._drift(alone, views.class_name, reference, seed)),
        }

    def pictures(
        self, family: Family, class_name: str, seed: int, trigger: str | None = TRIGGER
    ) -> list[Image.Image]:
        """One picture a prompt, all from the same seed, with the guidance of mini's config."""
        prompts = [
            without_trigger(prompt, class_name)
            if trigger is None
            else fill_prompt(prompt, trigger, class_name)
            for prompt in MINI
        ]
        rows = sample_prompts(family, prompts, [seed], steps=self.steps, guidance=self.guidance)
        return [row[0] for row in rows]

    def _reference(self, views: Views) -> Reference:
        if views.name not in self._references:
            real = subject_views(views.name, self.work, PHOTO_PX, 1, len(MINI), seed=99).held_out
            parts = (views.held_out, views.train, real)
            features = [image_features(to_pil(_shrink(part))) for part in parts]
            self._references[views.name] = Reference(*features)
        return self._references[views.name]

    def _drift(
        self, alone: Sequence[Image.Image], class_name: str, reference: Reference, seed: int
    ) -> Numbers:
        held = reference.held_out
        plain = image_features(_resized(self._of_base(class_name, None, seed), SIZE_PX))
        drifted = image_features(alone)
        nearer = mean_pairwise_cosine(drifted, held) - mean_pairwise_cosine(plain, held)
        moved = 1 - float((plain * drifted).sum(1).mean())
        return {"class_moved": moved, "class_nearer_to_subject": nearer}

    def _of_base(self, class_name: str, trigger: str | None, seed: int) -> list[Image.Image]:
        """Kept on disk: every method is measured beside the same ones."""
        folder = self.work / "base_pictures" / f"{self.base_hash}-{self.steps}"
        path = folder / f"{trigger or ''}-{class_name}-{seed}.safetensors"
        if path.is_file():
            return to_pil(load_state(path)[0]["pictures"])
        drawn = self.pictures(self.base, class_name, seed, trigger)
        save_state(path, {"pictures": to_tensor(drawn)}, {"prompts": MINI})
        return drawn

    def _share(self, features: Tensor, name: str) -> float:
        found = self.gallery.nearest(features, 1)
        return sum(row[0] == name for row in found) / len(found)

    def _background(self, images: Sequence[Image.Image]) -> float:
        """Share right among the prompts that name one background of the probe."""
        found = self.probe.names(to_tensor(images))
        pairs = [(a, b) for a, b in zip(WHERE_OF, found, strict=True) if a in WHERE]
        return sum(a == b for a, b in pairs) / len(pairs)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> uint8 (N, 3, H, W)."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _resized(images: Sequence[Image.Image], size_px: int) -> list[Image.Image]:
    if images[0].width == size_px:
        return list(images)
    return [image.resize((size_px, size_px), Image.Resampling.BOX) for image in images]


def _shrink(images: Tensor) -> Tensor:
    """To mini's size: the ceiling must not profit from a resolution that mini cannot draw."""
    small = F.interpolate(images.float(), (SIZE_PX, SIZE_PX), mode="area")
    return small.round().to(torch.uint8)
