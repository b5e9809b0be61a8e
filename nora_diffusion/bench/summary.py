"""What a study says of its trials: scores, means, and differences to LoRA with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from nora_diffusion.bench.bootstrap import interval, paired_interval
from nora_diffusion.bench.ledger import Row

REFERENCES = ("LoRA r 1", "LoRA r 2", "LoRA r 16")
"""What every method is compared with, run by run."""


def score(row: Row) -> float:
    """What chooses: gap closed times backgrounds kept.

    A gap that has widened counts whole, whatever became of the backgrounds; a training that
    diverged scores 0, as it leaves the base.
    """
    if "diverged" in row:
        return 0.0
    gap = row["gap_closed"]
    return gap if gap < 0 else gap * row["background_adapted"] / row["background_base"]


def mean_row(rows: Sequence[Row]) -> Row:
    """Means of every number over the rows that have it; a diverged training has none."""
    usable = [row for row in rows if "diverged" not in row]
    names = dict.fromkeys(k for row in usable for k, v in row.items() if isinstance(v, float))
    means = {
        name: round(statistics.mean(row[name] for row in usable if name in row), 5)
        for name in names
    }
    return means | {"runs": len(rows), "diverged": len(rows) - len(usable)}


def sizes(rows: Sequence[Row]) -> Row:
    """What a method trains and stores; None where every training diverged."""
    first = next((row for row in rows if "diverged" not in row), {})
    return {name: first.get(name) for name in ("trained_parameters", "file_bytes")}


def summarise(rows: Sequence[Row], methods: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each method: means, intervals over subjects and seeds, and ``against``.

    These are differences to the ``REFERENCES`` on the same subjects and seeds, with intervals.
    """
    rows = [{**row, "score": score(row)} for row in rows]
    of_method = {name: [row for row in rows if row["method"] == name] for name in methods}
    lines: list[dict[str, Any]] = []
    for name, own in of_method.items():
        if not own:
            continue
        lines.append(
            {
                "method": name,
                **mean_row(own),
                **sizes(own),
                "learning_rate": own[0]["learning_rate"],
                "score": statistics.mean(row["score"] for row in own),
                "intervals": {
                    key: interval(own, key)
                    for key in ("gap_closed", "text_adapted", "background_adapted")
                },
                "against": {
                    other: {
                        key: paired_interval(own, of_method[other], key)
                        for key in ("score", "gap_closed", "text_adapted")
                    }
                    for other in REFERENCES
                    if other != name and of_method.get(other) and _in_common(own, of_method[other])
                },
            }
        )
    return lines


def _in_common(rows: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether any subject and seed was learnt by both."""
    usable = (
        {(row["subject"], row["seed"]) for row in some if "diverged" not in row}
        for some in (rows, others)
    )
    return not set.isdisjoint(*usable)
