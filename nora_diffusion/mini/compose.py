"""Composites: an emoji on a background, made in batches on any device, with a caption.

`Compositor.sample` is a pure function of its generator seed, so that a resumed run sees the same
pictures as an uninterrupted one.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.nn import functional as F

from nora_diffusion.mini.backgrounds import draw_background
from nora_diffusion.mini.sources import Concept, rgba

_OPENINGS = (
    "a photo of {}",
    "a picture of {}",
    "{}",
    "{}",
    "a photo of {}",
    "an image of {}",
    "a close view of {}",
)
_SMALL, _BIG = 0.55, 0.8  # shares of the canvas below and above which a caption may say the size
_PASS = 4096 * 64 * 64  # pixels rendered at once: at 128 px a chunk of 4096 would take 6 GB
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"


def nonsense_word(random: Random) -> str:
    """Returns a made-up word of 3 to 6 letters, pronounceable or not ("sks", "blemo")."""
    length = random.randint(3, 6)
    if random.random() < 0.5:
        return "".join(random.choice(_CONSONANTS + _VOWELS) for _ in range(length))
    return "".join(random.choice((_CONSONANTS, _VOWELS)[i % 2]) for i in range(length))


def wording(noun: str, scale: float, random: Random) -> str:
    """Words one emoji: opening, size if `scale` is small or large, sometimes a nonsense word."""
    words = []
    if random.random() < 0.35 and not _SMALL <= scale <= _BIG:
        words.append(random.choice(("small", "tiny") if scale < _SMALL else ("big", "large")))
    if random.random() < 0.25:
        words.append(nonsense_word(random))
    words.append(noun)
    phrase = " ".join(words)
    article = "an" if phrase[0] in "aeiou" else "a"
    return random.choice(_OPENINGS).format(f"{article} {phrase}")


def caption(concept: Concept, where: str, scale: float, random: Random) -> str:
    """Words one composite: the emoji, or its class, and most often its background."""
    noun = concept.class_name if random.random() < 0.25 else concept.noun
    text = wording(noun, scale, random)
    return f"{text} {where}" if random.random() < 0.93 else text


@dataclass(frozen=True)
class Placement:
    """Where an emoji goes on its canvas: `scale` (share of its side), `x`, `y` in [-1, 1]."""

    scale: float
    x: float
    y: float
    angle: float
    flip: bool

    @classmethod
    def draw(cls, random: Random) -> "Placement":
        """Draws a random placement that keeps at least most of the emoji on the canvas."""
        # Nearly filling the canvas: at 64 px an emoji of 30 px is too small to be recognised, and
        # one that may lie anywhere, turned and mirrored, takes far longer to learn.
        scale = random.uniform(0.78, 0.94)
        x, y = random.uniform(-0.08, 0.08), random.uniform(-0.08, 0.08)
        return cls(scale, x, y, random.uniform(-0.05, 0.05), flip=False)

    def matrix(self) -> list[list[float]]:
        """The affine map from canvas to texture coordinates that `affine_grid` expects."""
        c, s = np.cos(self.angle) / self.scale, np.sin(self.angle) / self.scale
        m = -1 if self.flip else 1
        tx, ty = -(c * self.x + s * self.y), s * self.x - c * self.y
        return [[m * c, m * s, m * tx], [-s, c, ty]]


class Compositor:
    """Makes composites of `concepts` at `size_px` on `device`.

    Args:
        concepts: the emoji to choose from, uniformly.
        size_px: side of the pictures.
        backgrounds: how many backgrounds to draw once and reuse at random.
        device: where composites are made.
        seed: of the drawn backgrounds.
    """

    def __init__(
        self,
        concepts: list[Concept],
        size_px: int,
        backgrounds: int = 6000,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ):
        random = Random(seed)
        self.concepts, self.size_px, self.device = concepts, size_px, torch.device(device)
        # Two levels of texture: bilinear sampling of a single one aliases when it shrinks.
        stacked = [
            np.stack([rgba(c.path, side, c.frame) for c in concepts])
            for side in (size_px, size_px // 2)
        ]
        self.textures = [torch.from_numpy(s).to(self.device, torch.float16) for s in stacked]
        drawn = [draw_background(size_px, random) for _ in range(backgrounds)]
        self.backgrounds = torch.from_numpy(np.stack([d[0] for d in drawn])).to(self.device)
        self.phrases = [d[1] for d in drawn]

    def sample(self, n: int, seed: int) -> tuple[torch.Tensor, list[str], list[int]]:
        """Makes `n` composites.

        Returns:
            uint8 images (n, 3, size_px, size_px), their captions and concept indices.
        """
        random = Random(seed)
        which = [random.randrange(len(self.concepts)) for _ in range(n)]
        behind = [random.randrange(len(self.phrases)) for _ in range(n)]
        placements = [Placement.draw(random) for _ in range(n)]
        captions = [
            caption(self.concepts[w], self.phrases[b], p.scale, random)
            for w, b, p in zip(which, behind, placements, strict=True)
        ]
        return self.render(which, behind, placements), captions, which

    def render(
        self, which: list[int], behind: list[int], placements: list[Placement]
    ) -> torch.Tensor:
        """Composites concepts `which` over backgrounds `behind`: uint8 (n, 3, size, size)."""
        n = max(1, _PASS // self.size_px**2)
        passes = [slice(i, i + n) for i in range(0, len(which), n)]
        return torch.cat([self._render(which[p], behind[p], placements[p]) for p in passes])

    def _render(
        self, which: list[int], behind: list[int], placements: list[Placement]
    ) -> torch.Tensor:
        n, size = len(which), self.size_px
        index = torch.tensor(which, device=self.device)
        theta = torch.tensor([p.matrix() for p in placements], device=self.device)
        grid = F.affine_grid(theta.float(), [n, 4, size, size], align_corners=False)
        fine = torch.tensor([p.scale > 0.6 for p in placements], device=self.device)
        layer = torch.zeros(n, 4, size, size, device=self.device)
        for texture, mask in zip(self.textures, (fine, ~fine), strict=True):
            if mask.any():
                chosen = texture[index[mask]].float()
                layer[mask] = F.grid_sample(chosen, grid[mask], align_corners=False)
        base = self.backgrounds[torch.tensor(behind, device=self.device)].float() / 255
        image = base * (1 - layer[:, 3:]) + layer[:, :3]
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures in [0, 255] -> float in [-1, 1]."""
    return images.float() / 127.5 - 1
