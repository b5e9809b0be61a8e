"""``nora bench`` end to end: true trainings, of two steps."""

import json
import shutil
from pathlib import Path

import pytest

from nora_diffusion.cli import USER_ERROR, main
from nora_diffusion.mini.__main__ import PRESETS
from nora_diffusion.mini.sources import PACKAGES

CACTUS = Path(__file__).with_name("1f335.webp")
"""The one emoji that the quick comparison learns (Fluent Emoji, MIT)."""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The work folder of mini's recipe, as if the packages had been fetched: with one emoji."""
    monkeypatch.setenv("NORA_MINI_WORK", str(tmp_path / "mini"))
    folder = tmp_path / "mini" / PRESETS["cpu"].name / "packages"
    for package in PACKAGES:
        content = folder / package.replace("/", "-").lstrip("@") / "package"
        (content / "assets").mkdir(parents=True)
        shutil.copy(CACTUS, content / "assets")
        named = {"\N{CACTUS}": {"name": "cactus", "group": "Animals & Nature"}}
        (content / "data-by-emoji.json").write_text(json.dumps(named))
        (content.parent / ".complete").touch()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("methods", "--device", "foo"), "--device: invalid choice: 'foo'"),
        (("methods", "--steps", "0"), "--steps: 0: must be at least 1"),
        (("ranks", "--workers", "0"), "--workers: 0: must be at least 1"),
        (("report", "--workers", "-1"), "--workers: -1: must be at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, options, told):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options, "--out", str(tmp_path)])
    assert stopped.value.code == USER_ERROR
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_check_belongs_to_the_report_and_trains_nothing(tmp_path, capsys):
    assert main(["bench", "methods", "--check", "--out", str(tmp_path)]) == USER_ERROR
    (told,) = capsys.readouterr().err.splitlines()
    assert "nora bench report --check" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quick_methods_run_every_stage_and_are_not_repeated(packages, tmp_path, capsys):
    command = ["bench", "methods", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "LoRA r 16" in capsys.readouterr().out
    first = json.loads((tmp_path / "methods-quick.json").read_text())["results"]
    assert {found["tries"] for found in first["search"].values()} == {2}
    assert {row["subject"] for row in first["rows"]} == {"cactus"}
    assert all(row["trained_parameters"] for row in first["rows"])
    assert (tmp_path / "methods-quick.png").stat().st_size > 10_000
    trials = (tmp_path / "trials.jsonl").read_text()
    assert main(command) == 0
    assert (tmp_path / "trials.jsonl").read_text() == trials


@pytest.mark.slow
def test_quick_prior_measures_the_class_with_and_without(packages, tmp_path):
    command = ["bench", "prior", "--quick", "--out", str(tmp_path)]
    assert main(command) == 0
    file = tmp_path / "prior-quick.json"
    rows = json.loads(file.read_text())["results"]["rows"]
    assert [(row["prior"], row["subject"]) for row in rows] == [
        ("none", "cactus"), ("base_prediction", "cactus"),
    ]  # fmt: skip
    assert rows[0]["class_moved"] != rows[1]["class_moved"]
    assert main(command) == 0
    assert json.loads(file.read_text())["results"]["rows"] == rows
