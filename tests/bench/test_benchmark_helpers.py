"""What the scripts in ``benchmarks/`` share."""

import importlib.util
import weakref
from pathlib import Path

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
