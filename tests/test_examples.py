"""The scripts in `examples/` run, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
def test_diffusers_subject(tmp_path):
    assert "flower.safetensors loss 0." in run("diffusers_subject.py", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"flower.png", "flower.safetensors"}


@pytest.mark.slow
def test_transformers_trainer(tmp_path):
    out = run("transformers_trainer.py", tmp_path)
    before, after = map(float, re.search(r"accuracy (.+) -> (.+)", out).groups())
    assert before < 0.7 and after == 1.0


@pytest.mark.slow
def test_peft_adapter(tmp_path):
    out = run("peft_adapter.py", tmp_path)
    error = {name: float(value) for name, value in re.findall(r"(.+): ([\d.]+)\n", out)}
    assert error["adapted to cos(2x)"] < 0.01 < error["base on cos(2x)"]
    assert error["loaded and merged"] == pytest.approx(error["adapted to cos(2x)"], abs=2e-4)
