"""``nora bench`` end to end, where the packages of emoji are at hand."""

import json

import pytest

from nora_diffusion.cli import main
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder

PACKAGES = default_work_folder() / PRESETS["cpu"].name / "packages"


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES.is_dir(), reason="the emoji have not been downloaded")
def test_quick_methods_run_every_stage_and_are_not_repeated(tmp_path, capsys):
    command = ["bench", "methods", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "LoRA r 16" in capsys.readouterr().out
    first = json.loads((tmp_path / "methods-quick.json").read_text())["results"]
    assert {found["tries"] for found in first["search"].values()} == {4}
    assert {row["subject"] for row in first["rows"]} == {"cactus"}
    assert all("class_moved" in row and row["trained_parameters"] for row in first["rows"])
    assert (tmp_path / "methods-quick.png").stat().st_size > 10_000
    trials = (tmp_path / "trials.jsonl").read_text()
    assert main(command) == 0
    assert (tmp_path / "trials.jsonl").read_text() == trials
