"""Outcomes of few-shot training runs: their summary over seeds, and a table of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """The outcome of one training run."""

    method: str
    shots: int
    seed: int
    accuracy: float
    trainable_parameters: int
    steps: int
    seconds: float


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and spread over seeds for each method and number of shots."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.shots), []).append(row)
    return [
        {
            "method": method,
            "shots": shots,
            "accuracy_mean": statistics.fmean(row.accuracy for row in group),
            "accuracy_std": _spread([row.accuracy for row in group]),
            "seeds": len(group),
            "trainable_parameters": group[0].trainable_parameters,
        }
        for (method, shots), group in groups.items()
    ]


def _spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; one seed shows none."""
    return statistics.stdev(values) if len(values) > 1 else None


def table(zero_shot: float, rows: Sequence[Row]) -> str:
    """The summary as text: a line a method, a column a number of shots, per cent."""
    cells = {(s["method"], s["shots"]): s for s in summary(rows)}
    shots = sorted({row.shots for row in rows})
    lines = [f"{'accuracy, %':12} {'trained':>9}" + "".join(f"{f'{k} shots':>14}" for k in shots)]
    lines.append(f"{'zero-shot':12} {0:9,}" + f"{zero_shot * 100:14.1f}" * len(shots))
    for method in dict.fromkeys(row.method for row in rows):
        count = next(row.trainable_parameters for row in rows if row.method == method)
        line = f"{method:12} {count:9,}"
        for k in shots:
            cell = cells.get((method, k))
            mean = "" if cell is None else f"{cell['accuracy_mean'] * 100:.1f}"
            std = None if cell is None else cell["accuracy_std"]
            line += f"{mean + ('' if std is None else f' ± {std * 100:.1f}'):>14}"
        lines.append(line)
    return "\n".join(lines)
