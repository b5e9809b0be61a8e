"""What a picture shows, measured: its nearest emoji of all, and its background.

The gallery holds the mean EffNet-Lite2 feature of composites of every emoji, the held-out ones
included: it is a ruler, not training data of any model that draws. Gallery and probe for the
shipped mini come with the package; ``python -m nora_diffusion.mini.gallery`` makes them again.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from nora_diffusion.evaluation.image_features import image_features, to_pil
from nora_diffusion.mini.backgrounds import COLOURS, SCENES, draw_background
from nora_diffusion.mini.compose import Compositor, Placement
from nora_diffusion.mini.sources import Concept, concepts, held_out
from nora_diffusion.mini.state import load_state, save_state

CHUNK = 64  # emoji between two saves
WHERE = [*SCENES, *(f"on a {colour} background" for colour in COLOURS)]
THUMBNAIL = 3 * (16 * 16 + 8 * 8)  # numbers of a thumbnail


SHIPPED = Path(__file__).parents[1] / "assets" / "mini_ruler.safetensors"


class Gallery:
    """Mean features of every emoji by name, for nearest-neighbour questions.

    Args:
        names: of N emoji.
        features: (N, 1280).
    """

    def __init__(self, names: list[str], features: torch.Tensor):
        self.names, self.features = names, F.normalize(features, dim=1)

    @classmethod
    def build(cls, work: Path, size_px: int, views: int = 2) -> Gallery:
        """Render and measure every emoji.

        Args:
            work: the recipe's work folder; the features are cached there.
            size_px: side of the composites.
            views: composites a emoji, each on another background.
        """
        members = [*concepts(work, "full"), *held_out(work)]
        names = [c.name for c in members]
        path = work / f"gallery-{size_px}-{views}.safetensors"
        parts = _finished_parts(path, names)
        if len(parts) < len(members):
            compositor = Compositor(members, size_px, backgrounds=400, seed=5)
            images = _views(compositor, views).unflatten(0, (len(members), views))
            with tqdm(total=len(members), initial=len(parts), desc="gallery", unit="emoji") as bar:
                while len(parts) < len(members):  # minutes on a CPU: kept as they come
                    chunk = images[len(parts) : len(parts) + CHUNK]
                    features = image_features(to_pil(chunk.flatten(0, 1)))
                    mean = features.unflatten(0, (len(chunk), views)).mean(1)
                    parts = torch.cat([parts, mean])
                    save_state(path, {"features": parts}, {"names": names})
                    bar.update(len(chunk))
        return cls(names, parts)

    @classmethod
    def shipped(cls) -> Gallery:
        """The gallery at the size of the shipped mini."""
        tensors, about = load_state(SHIPPED)
        return cls(about["names"], tensors["gallery"].float())

    def nearest(self, features: torch.Tensor, n: int = 5) -> list[list[str]]:
        """Names of the `n` nearest emoji for each row of `features` (N, 1280), nearest first."""
        # Pictures share backgrounds and style: what all have in common is taken out first.
        centre = self.features.mean(0)
        gallery = F.normalize(self.features - centre, dim=1)
        order = (F.normalize(features - centre, dim=1) @ gallery.T).topk(n, dim=1).indices
        return [[self.names[i] for i in row] for row in order.tolist()]


def _finished_parts(path: Path, names: list[str]) -> torch.Tensor:
    """Features (n, 1280) of the first n emoji, as far as an earlier call got."""
    if path.exists():
        tensors, about = load_state(path)
        if about["names"] == names:
            return tensors["features"]
    return torch.zeros(0, 1280)


def _views(compositor: Compositor, views: int) -> torch.Tensor:
    random = Random(6)
    which = [i for i in range(len(compositor.concepts)) for _ in range(views)]
    behind = [random.randrange(len(compositor.phrases)) for _ in which]
    placements = [
        Placement(
            random.uniform(0.6, 0.85),
            random.uniform(-0.15, 0.15),
            random.uniform(-0.15, 0.15),
            random.uniform(-0.1, 0.1),
            random.random() < 0.5,
        )
        for _ in which
    ]
    return compositor.render(which, behind, placements)


def real_composites(
    concept_list: list[Concept], where: list[str], size_px: int, seed: int
) -> torch.Tensor:
    """One composite of each concept on the background of the same index: uint8 (N, 3, S, S)."""
    random = Random(seed)
    compositor = Compositor(concept_list, size_px, backgrounds=1, seed=seed)
    drawn = [torch.from_numpy(draw_background(size_px, random, w)[0]) for w in where]
    compositor.backgrounds = torch.stack(drawn)
    placements = [Placement.draw(random) for _ in where]
    return compositor.render(list(range(len(where))), list(range(len(where))), placements)


class BackgroundProbe:
    """Names the background of a picture: a small network on thumbnails, trained on composites.

    Attributes:
        ceiling: its own accuracy on fresh composites, which scores are read against.
    """

    ceiling: float

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.network = nn.Sequential(
                nn.Linear(THUMBNAIL, 192), nn.GELU(), nn.Dropout(0.2), nn.Linear(192, len(WHERE))
            ).eval()

    @classmethod
    def build(
        cls, work: Path, size_px: int, samples: int = 9000, fresh: int = 1000
    ) -> BackgroundProbe:
        """Train a probe on `samples` composites and test it on `fresh` others."""
        members, random = concepts(work, "common"), Random(7)
        total = samples + fresh
        pool = [(draw_background(size_px, random, w)[0], w) for w in WHERE for _ in range(80)]
        compositor = Compositor(members, size_px, backgrounds=1, seed=7)
        compositor.backgrounds = torch.stack([torch.from_numpy(p[0]) for p in pool])
        which = [random.randrange(len(members)) for _ in range(total)]
        behind = [random.randrange(len(pool)) for _ in range(total)]
        images = compositor.render(which, behind, [Placement.draw(random) for _ in range(total)])
        labels = torch.tensor([WHERE.index(pool[b][1]) for b in behind])
        inputs, probe = _thumbnail(images), cls()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            probe.network.train()
            probe._fit(inputs[:samples], labels[:samples])
        guess = probe.network.eval()(inputs[samples:]).argmax(1)
        probe.ceiling = float((guess == labels[samples:]).float().mean())
        return probe

    @classmethod
    def shipped(cls) -> BackgroundProbe:
        """The probe at the size of the shipped mini."""
        tensors, about = load_state(SHIPPED)
        probe = cls()
        weights = {k[6:]: v.float() for k, v in tensors.items() if k.startswith("probe.")}
        probe.network.load_state_dict(weights)
        probe.ceiling = about["probe_ceiling"]
        return probe

    def _fit(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.01)
        for _ in range(12):
            for index in torch.randperm(len(inputs)).split(128):
                loss = F.cross_entropy(self.network(inputs[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def names(self, images: torch.Tensor) -> list[str]:
        """The phrase in `WHERE` that fits each uint8 picture (N, 3, S, S) best."""
        return [WHERE[i] for i in self.network(_thumbnail(images)).argmax(1).tolist()]


def _thumbnail(images: torch.Tensor) -> torch.Tensor:
    """Colours at 16 x 16 and their spread at 8 x 8, as one vector a picture."""
    pixels = images.float() / 127.5 - 1
    mean = F.adaptive_avg_pool2d(pixels, 16)
    spread = F.adaptive_avg_pool2d(pixels.square(), 8) - F.adaptive_avg_pool2d(pixels, 8).square()
    return torch.cat([mean.flatten(1), spread.clamp_min(0).sqrt().flatten(1) * 2], dim=1)


def main() -> None:
    """Make gallery and probe for the shipped mini, and store them in the package."""
    from nora_diffusion.mini.__main__ import PRESETS, default_work_folder

    recipe = PRESETS["cpu"]
    work = default_work_folder() / recipe.name
    gallery = Gallery.build(work, recipe.size_px)
    probe = BackgroundProbe.build(work, recipe.size_px)
    of_probe = {f"probe.{name}": w.half() for name, w in probe.network.state_dict().items()}
    about = {"names": gallery.names, "probe_ceiling": probe.ceiling, "size_px": recipe.size_px}
    save_state(SHIPPED, {"gallery": gallery.features.half(), **of_probe}, about)
    print(f"{SHIPPED}: {len(gallery.names)} emoji; the probe is right on {probe.ceiling:.1%}")


if __name__ == "__main__":
    main()
