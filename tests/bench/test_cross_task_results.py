"""The recorded run of `benchmarks/cross_task.py` compares like with like."""

import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "cross_task.json"
RESULTS = (
    json.loads(FILE.read_text(encoding="utf-8"))["results"] if FILE.is_file() else {"rows": []}
)
TASKS = list(dict.fromkeys(row["task"] for row in RESULTS["rows"]))


def tries(task: str, method: str) -> list[tuple[float, int]]:
    rows = [r for r in RESULTS["rows"] if (r["task"], r["method"]) == (task, method)]
    return [(row["learning_rate"], row["seed"]) for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_every_method_got_the_same_tries(task):
    methods = {row["method"] for row in RESULTS["rows"] if row["task"] == task} - {"before"}
    assert {"nora", "lora"} <= methods
    for method in methods:
        found = tries(task, method)
        first = {rate for rate, seed in found if seed == RESULTS["seeds"][0]}
        assert first == set(RESULTS["learning_rates"])
        assert len(found) == len(RESULTS["learning_rates"]) + len(RESULTS["seeds"]) - 1
        assert len({rate for rate, seed in found if seed != RESULTS["seeds"][0]}) == 1
