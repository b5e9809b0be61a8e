"""``nora bench ranks``: what outer and inner rank do, on subjects of different complexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nora_diffusion.bench.ledger import Ledger, Row
from nora_diffusion.bench.methods import SPLIT, Method, nora
from nora_diffusion.bench.study import Plan, Study
from nora_diffusion.bench.summary import mean_row, score
from nora_diffusion.bench.trial import Trial

OUTER, INNER = (4, 8, 16, 32, 64), (1, 2, 4, 8, 16)
SUBJECTS = ("hibiscus", "poodle", "backpack")
GOOD_ENOUGH = 0.95


def run_ranks(plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> Row:
    """Run or continue the grid, every cell at the learning rate that was found for ``SPLIT``.

    Args:
        plan: steps, subjects and seeds.
        ledger: finished trials.
        save: called with the results after every trial and at the end.

    Returns:
        ``cells``: means by pair of ranks and subject; ``guideline``: the fitted law, and for each
        subject the pair with the fewest parameters whose score is within 5 % of its best.
    """
    study = Study(plan, ledger, save)
    study.search([SPLIT])
    rate = study.rates[SPLIT.name]
    trials = [
        Trial(_of_ranks(r, inner_r), subject, rate, seed, plan.steps)
        for seed in plan.seeds
        for subject in plan.subjects
        for r in OUTER
        for inner_r in INNER
        if inner_r <= r
    ]

    def so_far() -> None:
        study.results["cells"] = cells = _cells(ledger, trials)
        study.results["guideline"] = guideline(cells)
        save(study.results)

    ledger.run(trials, so_far)
    so_far()
    return study.results


def _of_ranks(r: int, inner_r: int) -> Method:
    return nora(r, inner_r, init="gradient", text_basis="random")


def _cells(ledger: Ledger, trials: Sequence[Trial]) -> list[Row]:
    found: dict[tuple[str, int, int], list[Row]] = {}
    for trial in trials:
        row = ledger.find(trial)
        if row is not None:
            given = trial.method.nora
            ranks = (given["adapter.r"], given["adapter.inner_r"])
            found.setdefault((trial.subject, *ranks), []).append(row)
    return [
        {
            "subject": subject, "r": r, "inner_r": inner_r,
            "trained_parameters": rows[0].get("trained_parameters"),
            "score": sum(map(score, rows)) / len(rows), **mean_row(rows),
        }
        for (subject, r, inner_r), rows in found.items()
    ]  # fmt: skip


def guideline(cells: Sequence[Row]) -> Row:
    """Score = a + b log2 r + c log2 inner_r by least squares, and the smallest good pairs.

    Every subject has an a of its own, as some are harder than others.

    Args:
        cells: with ``subject``, ``r``, ``inner_r``, ``score`` and ``trained_parameters``.
    """
    smallest: dict[str, Row] = {}
    subjects = list(dict.fromkeys(cell["subject"] for cell in cells))
    for subject in subjects:
        own = [cell for cell in cells if cell["subject"] == subject]
        best = max(cell["score"] for cell in own)
        enough = best - (1 - GOOD_ENOUGH) * abs(best)  # the best may be below 0
        good = [cell for cell in own if cell["score"] >= enough]
        least = min(good, key=lambda cell: cell["trained_parameters"] or math.inf)
        smallest[subject] = {key: least[key] for key in ("r", "inner_r", "score")}
    if len(cells) < 4:
        return {"smallest_good": smallest}
    own_a = np.array([[cell["subject"] == subject for subject in subjects] for cell in cells])
    doublings = np.array([[math.log2(cell[key]) for key in ("r", "inner_r")] for cell in cells])
    sides = np.hstack([doublings, own_a])
    scores = np.array([cell["score"] for cell in cells])
    fitted, *_ = np.linalg.lstsq(sides, scores, rcond=None)
    means = own_a @ (own_a.T @ scores / own_a.sum(0))
    spread = float(np.var(scores - means))
    return {
        "smallest_good": smallest,
        "score_at_1": round(float(fitted[2:].mean()), 5),
        "a_doubling_of_r": round(float(fitted[0]), 5),
        "a_doubling_of_inner_r": round(float(fitted[1]), 5),
        "share_explained": (
            round(1 - float(np.var(scores - sides @ fitted)) / spread, 4) if spread else None
        ),
    }
