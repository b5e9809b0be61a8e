"""The comparison of methods is a fair one: the same tries, data and steps for each."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.tiny_language import save_base, write_questions

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("language_benchmark", BENCHMARKS / "language.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "language_benchmark", module)  # for its dataclass
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(benchmark, monkeypatch, tmp_path):
    """What a whole benchmark of a tiny model writes, and how to run it once more."""
    for name in benchmark.SETS:
        (tmp_path / "data" / name).mkdir(parents=True)
        write_questions(tmp_path / "data" / name / "train.json", 6)
        write_questions(tmp_path / "data" / name / "test.json", 3)
    monkeypatch.setattr(benchmark, "RATES", {"lora": (1e-3, 1e-2), "nora": (2e-3, 2e-2)})
    monkeypatch.setattr(benchmark, "SEEDS", (1,))
    monkeypatch.setattr(benchmark, "BASES", ("weight", "random"))
    # In this process, which alone knows the smaller settings above.
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    written = []
    monkeypatch.setattr(benchmark, "write_result", lambda name, found, note: written.append(found))
    base = save_base(tmp_path / "base")
    size = benchmark.Size(96, 1, 2, 4, 2, None, 1, True)
    monkeypatch.setattr(benchmark, "TARGETS", ["q_proj", "down_proj"])

    def run():
        benchmark.Benchmark(base, "cpu", size, tmp_path / "data", tmp_path / "work", 1, False).run()
        return written[-1]

    return run(), run


def test_every_method_gets_the_same_tries_and_seeds(benchmark, results):
    found, run_again = results
    tries = found["tries_a_method"]
    assert len(tries) == len(benchmark.FIXED) + 2
    assert set(tries.values()) == {2}
    for method, searched in found["search"].items():
        wanted = {"0.002", "0.02"} if method.startswith("nora") else {"0.001", "0.01"}
        assert set(searched["validation"]) == wanted
    rows = {method: [r for r in found["rows"] if r["method"] == method] for method in tries}
    assert all([row["seed"] for row in of_one] == [1] for of_one in rows.values())
    assert {row["learning_rate"] for row in rows["lora_r8"]} == {
        found["search"]["lora_r8"]["learning_rate"]
    }
    assert found["summary"]["lora_r32"]["likelihood_minus_lora_r32"]["mean"] == 0
    shapes = {m: s["trained_parameters"] for m, s in found["summary"].items() if m != "base"}
    assert shapes["lora_r32"] == 4 * shapes["lora_r8"]

    # Run again, all is read from the work folder.
    benchmark.make_trainer = None
    assert run_again()["rows"] == found["rows"]


def test_no_method_leaves_a_trace_in_the_base(benchmark, tmp_path):
    from nora_diffusion.language_model import load_model
    from nora_diffusion.train.common import weights_digest
    from nora_diffusion.train.language import add_adapter

    base = load_model(save_base(tmp_path / "base"), "fp32", torch.device("cpu"))
    before = weights_digest(base)
    for method, config in benchmark.methods().items():
        if method.endswith(("activation", "gradient")):
            continue  # fitted first; the layers are those of the others
        config.target_modules = {"q_proj", "down_proj"}
        config.r = 8
        base = add_adapter(base, config).unload()
        assert weights_digest(base) == before, method


def test_an_answer_can_be_the_text_of_an_option(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with_text_answers = importlib.import_module("_language_questions").with_text_answers
    row = {
        "instruction": "Please choose the correct answer to the question: What absorbs water?\n\n"
        "Answer1: Roots Answer2: the leaves, mostly Answer3: Flowers\n\n"
        "Answer format: answer1/answer2/answer3",
        "input": "", "output": "the correct answer is answer2", "answer": "answer2",
    }  # fmt: skip
    found = with_text_answers(row)
    assert found["instruction"] == "What absorbs water?"
    assert found["options"] == ["Roots", "the leaves, mostly", "Flowers"]
    assert found["answer"] == found["output"] == "the leaves, mostly"
    yes_or_no = {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}
    assert with_text_answers(yes_or_no) == yes_or_no


def test_recorded_answers_as_text_are_what_the_page_says_of_them():
    """docs/language.md: equal tries and seeds; the means meet the aim, level is shown."""
    record = json.loads((BENCHMARKS / "results/language-text.json").read_bytes())["results"]
    assert set(record["tries_a_method"].values()) == {3}
    assert {len(found["validation"]) for found in record["search"].values()} == {3}
    summary = {name: row for name, row in record["summary"].items() if name != "base"}
    assert {row["seeds"] for row in summary.values()} == {3}
    assert record["base_scores"]["ARC-Easy"]["questions"] == 400
    ours = [row for name, row in summary.items() if name.startswith("nora")]
    assert len(ours) == 2
    for row in ours:
        difference = row["likelihood_minus_lora_r32"]
        assert row["trained_share_of_lora_r32"] < 0.024
        assert difference["low"] < 0 < difference["mean"]
        assert row["step_s"] < 0.82 * summary["lora_r32"]["step_s"]
    best = {name: max(found["validation"].values()) for name, found in record["search"].items()}
    assert max(best, key=best.__getitem__) == "lora_r32"
    assert min(best, key=best.__getitem__) == "lora_xs_r32"
