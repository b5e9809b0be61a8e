"""Intervals by bootstrap over subjects and, within each, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 2000


def interval(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """The 95 % interval of a mean over runs: subjects are drawn again, then seeds of each.

    Args:
        rows: with ``subject`` and the number; those without it are left out.
        key: of the number.
    """
    by_subject: dict[str, list[float]] = {}
    for row in rows:
        if key in row:
            by_subject.setdefault(row["subject"], []).append(row[key])
    return _interval(list(by_subject.values()))


def paired_interval(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str
) -> dict[str, float]:
    """Mean difference of two methods on the same subjects and seeds, and its 95 % interval.

    Raises:
        ValueError: they have no subject and seed in common.
    """
    of_other = {(row["subject"], row["seed"]): row[key] for row in others if key in row}
    differences: dict[str, list[float]] = {}
    for row in rows:
        pair = (row["subject"], row["seed"])
        if key in row and pair in of_other:
            differences.setdefault(row["subject"], []).append(row[key] - of_other[pair])
    if not differences:
        raise ValueError(f"{key}: no subject and seed in common")
    low, high = _interval(list(differences.values()))
    mean = float(np.mean([value for values in differences.values() for value in values]))
    return {"mean": round(mean, 5), "low": low, "high": high}


def _interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    if not groups:
        return (float("nan"), float("nan"))
    rng, count = np.random.default_rng(0), len(groups)
    # For every draw and place the mean of seeds drawn again, of each subject that may come there.
    means = np.stack(
        [
            np.asarray(own)[rng.integers(0, len(own), (DRAWS, count, len(own)))].mean(-1)
            for own in groups
        ]
    )
    chosen = rng.integers(0, count, (1, DRAWS, count))
    low, high = np.percentile(np.take_along_axis(means, chosen, 0)[0].mean(-1), [2.5, 97.5])
    return round(float(low), 5), round(float(high), 5)
