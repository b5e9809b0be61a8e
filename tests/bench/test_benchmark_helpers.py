"""What the scripts in ``benchmarks/`` share."""

import importlib.util
import runpy
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

COMMON = Path(__file__).parents[2] / "benchmarks" / "_common.py"


def load_common():
    spec = importlib.util.spec_from_file_location("benchmarks_common", COMMON)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_saved_bytes_are_counted_once_and_freed():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    seen = []
    model[1].register_forward_hook(lambda module, given, out: seen.append(weakref.ref(out)))
    x = torch.randn(2, 4)
    found = load_common().bytes_saved(model, lambda: model(x).sum())
    # x for the first layer's gradient; the tanh's output for its own and for the last layer's.
    assert found == 4 * (2 * 4 + 2 * 5)
    assert [out() for out in seen] == [None]


def test_tasks_without_their_extra_show_help_and_say_what_is_missing(monkeypatch, capsys):
    folder = COMMON.parent
    monkeypatch.syspath_prepend(folder)
    for name in ("_common", "_names", "_tasks"):  # of this test alone
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(sys, "argv", ["cross_task.py", "--help"])
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(folder / "cross_task.py"), run_name="__main__")
        assert stopped.value.code == 0 and "--tasks" in capsys.readouterr().out
        tasks = sys.modules["_tasks"]
        monkeypatch.setattr(tasks, "minilm", lambda: folder)
        monkeypatch.setattr(tasks, "is_installed", lambda: True)
        told = tasks.missing("translation", folder)
        assert told == 'sacrebleu is missing: pip install "nora-diffusion[tasks]"'
        assert tasks.missing("token_classification", folder) is None
    finally:
        for name in ("_common", "_names", "_tasks"):
            sys.modules.pop(name, None)


@pytest.fixture
def held_out(monkeypatch):
    folder = COMMON.parent
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "_common", raising=False)
    spec = importlib.util.spec_from_file_location("benchmarks_held_out", folder / "held_out.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("_common", None)


def test_methods_are_ranked_by_what_holds_for_other_views(held_out):
    few, many = held_out.METHODS[:2]
    rows = [
        {"method": method.name, "learning_rate": rate, "subject": subject, "trained_parameters": 7,
         "photos": learnt, "held_out": held + 0.1 * (subject == "b")}
        for method, rate, learnt, held in (
            (few, 0.1, 0.5, 0.2), (few, 0.2, 0.7, 0.1), (many, 0.1, 0.4, 0.3), (many, 0.2, 0.6, 0.0)
        )
        for subject in "ab"
    ]  # fmt: skip
    found = held_out.summarise(rows)
    assert [line["method"] for line in found] == [many.name, few.name]
    assert [(line["best_rate"], line["photos"]) for line in found] == [("0.1", 0.4), ("0.1", 0.5)]
    assert found[1]["held_out"] == pytest.approx(0.25)
    assert found[1]["rates"]["0.2"] == {"photos": 0.7, "held_out": 0.15}
