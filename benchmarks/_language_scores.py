"""What the rows of ``language.py`` say together: accuracies, and differences with intervals."""

import statistics
from typing import Any

import numpy as np

KINDS = ("likelihood", "generated", "probability")


def accuracies(row: dict[str, Any]) -> dict[str, Any]:
    """Accuracy a set of a row, both ways, and the right option's mean probability."""
    return {
        name: {
            "questions": len(one["correct"]),
            "likelihood": share(one["likelihood"], one["correct"]),
            "generated": share(one["generated"], one["correct"]),
            "probability": float(np.mean(one["probability"])),
        }
        for name, one in row.get("sets", {}).items()
    }


def share(given: list[int], wanted: list[int]) -> float:
    return float(np.mean(np.asarray(given) == np.asarray(wanted)))


def summarise(base: dict[str, Any], finals: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and the difference to LoRA r 32 with its bootstrap interval."""
    summary: dict[str, Any] = {"base": {k: float(hits(base, k).mean()) for k in KINDS}}
    reference = finals["lora_r32"]
    for method, rows in finals.items():
        pairs = [
            (row, other) for row in rows for other in reference if row["seed"] == other["seed"]
        ]
        if not pairs:
            continue
        entry: dict[str, Any] = {
            "seeds": len(rows),
            "learning_rate": rows[0]["learning_rate"],
            "trained_parameters": rows[0]["trained_parameters"],
            "trained_share_of_lora_r32": (
                rows[0]["trained_parameters"] / reference[0]["trained_parameters"]
            ),
            "file_bytes": rows[0]["file_bytes"],
            "step_s": statistics.median(row["step_s"] for row in rows),
            "activation_bytes_of_4_examples": rows[0]["activation_bytes_of_4_examples"],
        }
        for kind in KINDS:
            entry[kind] = float(np.mean([hits(row, kind).mean() for row in rows]))
            differences = [hits(row, kind) - hits(other, kind) for row, other in pairs]
            entry[f"{kind}_minus_lora_r32"] = bootstrap(np.mean(differences, axis=0))
        summary[method] = entry
    return summary


def hits(row: dict[str, Any], kind: str) -> np.ndarray:
    """A number a question, over all sets: right or not, or the probability of the right option."""
    values: list[float] = []
    for one in row["sets"].values():
        wanted = one["correct"]
        values += (
            one["probability"] if kind == "probability"
            else [float(a == b) for a, b in zip(one[kind], wanted, strict=True)]
        )  # fmt: skip
    return np.asarray(values)


def bootstrap(differences: np.ndarray, draws: int = 10_000) -> dict[str, float]:
    """Mean of paired differences and its 95 % interval over questions drawn again."""
    generator, count = np.random.default_rng(0), len(differences)
    means = np.concatenate(
        [
            differences[generator.integers(0, count, (100, count))].mean(1)
            for _ in range(draws // 100)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}
