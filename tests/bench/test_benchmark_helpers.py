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
