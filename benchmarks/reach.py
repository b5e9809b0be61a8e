"""How much of a weight's gradient the core of a NoRA adapter can reach, by basis and ranks.

    python benchmarks/reach.py [--subjects snail blowfish]

On mini: the gradient of the subject's loss with respect to every adapted weight, at the base, over
two halves of the same batches. Bases that look at the gradient, and the start of Q, are fitted on
one half; what is reported is the share of the squared norm of the *other* half that lies inside
U . V (core), and what the k fitted rows of Q let through of it in the first step (start). Random
directions need nothing but a seed, the choice among W's own only 2 r indices.
Writes ``benchmarks/results/reach.json``.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from torch import Tensor

from nora_diffusion.adapter import iter_nora_layers
from nora_diffusion.adapter.factors import seeded_orthonormal
from nora_diffusion.bench import trial
from nora_diffusion.bench.methods import nora
from nora_diffusion.bench.ruler import PHOTO_PX
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder
from nora_diffusion.mini.subjects import subject_views
from nora_diffusion.train.adapters import subject_loss

BATCHES = 32
KINDS = {"attn1": "self-attention", "attn2": "cross-attention", ".ff.": "feed-forward"}
_linalg: Any = torch.linalg  # torch ships no annotations for it


def kind_of(name: str) -> str:
    """Which row of the table a weight belongs to."""
    return next((kind for part, kind in KINDS.items() if part in name), "text encoder")


def gradients(subject: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, weight, and the two halves of its gradient, float64, of every adapted weight."""
    views = subject_views(subject, default_work_folder() / PRESETS["cpu"].name, PHOTO_PX)
    with tempfile.TemporaryDirectory() as folder:
        wanted = trial.Trial(nora(), subject, 2e-2, 0, 1)
        cfg = trial.trial_config(wanted, views, Path(folder))
        session = trial.open_session(cfg, wanted.method, Path(folder), torch.device("cpu"))
        weights = {
            f"{component}.{name}": layer.get_base_layer().weight.requires_grad_()
            for component, model in session.models.items()
            for name, layer in iter_nora_layers(model)
        }
        halves = [[torch.zeros_like(w) for w in weights.values()] for _ in range(2)]
        for index in range(BATCHES):
            loss = subject_loss(cfg, session.family, session.inputs, index, encode=True)
            found = torch.autograd.grad(loss, list(weights.values()))
            for total, gradient in zip(halves[index % 2], found, strict=True):
                total += gradient
    for (name, weight), a, b in zip(weights.items(), *halves, strict=True):
        yield name, weight.detach().double(), a.double(), b.double()


def bases(weight: Tensor, fitted_on: Tensor) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Label, ``U (out, r)``, ``V (r, in)`` and inner rank."""
    left, _, right = _linalg.svd(weight, full_matrices=False)
    for r, k in ((32, 8), (64, 4), (128, 2)):
        yield f"the largest of W, {r}/{k}", left[:, :r], right[:r], k
    energy = (left.mT @ fitted_on @ right.mT).square()
    rows, columns = energy.sum(1).topk(32).indices, energy.sum(0).topk(32).indices
    yield "chosen among W's by gradient, 32/8", left[:, rows], right[columns], 8
    left, _, right = _linalg.svd(fitted_on, full_matrices=False)
    yield "the largest of the gradient, 32/8", left[:, :32], right[:32], 8
    for r, k in ((32, 8), (128, 2)):
        left = seeded_orthonormal(weight.shape[0], r, 0, "left")
        yield f"random, {r}/{k}", left, seeded_orthonormal(weight.shape[1], r, 0, "right").mT, k


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["snail", "blowfish"])
    subjects = parser.parse_args().subjects
    shares: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: {"core": [], "start": []})
    )
    for subject in subjects:
        for name, weight, a, b in gradients(subject):
            if min(weight.shape) < 128:
                continue
            for label, left, right, k in bases(weight, a):
                core = left.mT @ b @ right.mT
                Q = _linalg.svd(left.mT @ a @ right.mT).Vh[:k]
                found = shares[label][kind_of(name)]
                found["core"].append(float(core.norm() ** 2 / b.norm() ** 2))
                found["start"].append(float((core @ Q.mT).norm() ** 2 / b.norm() ** 2))
    table = {
        label: {
            kind: {what: round(statistics.mean(values), 4) for what, values in found.items()}
            for kind, found in kinds.items()
        }
        for label, kinds in shares.items()
    }
    write_result("reach", {"subjects": subjects, "batches": BATCHES, "shares": table})


if __name__ == "__main__":
    main()
