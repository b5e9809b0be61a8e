"""``train.steps = "auto"``: the rule, and that a run keeps to the number it began with."""

import pytest

from nora_diffusion import presets
from nora_diffusion.config import load_config, load_run
from nora_diffusion.events import read_events
from nora_diffusion.presets import auto_steps
from nora_diffusion.train import dreambooth
from nora_diffusion.train.common import TrainingInterrupted
from nora_diffusion.train.steps import resolve_steps
from tests.train.test_dreambooth import assert_same, interrupt, trained


@pytest.mark.parametrize(
    ("photos", "pictures", "expected"),
    [
        (1, 1, 400),
        (4, 1, 400),
        (5, 1, 500),
        (12, 1, 1200),
        (20, 1, 2000),
        (90, 1, 2000),
        (5, 4, 400),
        (12, 4, 600),
        (20, 4, 1000),
        (20, 3, 1160),  # 2000 / sqrt(3) = 1154.7, up to tens
    ],
)
def test_the_rule(photos, pictures, expected):
    assert auto_steps(photos, pictures) == expected


def test_both_ways_to_more_pictures_a_step_count_the_same():
    cfg = load_config(
        "sdxl",
        ["data.subject=sample_data/subject", "data.class_name=toy", "train.steps=auto"],
    )

    def resolved(**changes) -> int:
        train = cfg.train.model_copy(update=changes)
        return resolve_steps(cfg.model_copy(update={"train": train}))[0].train.total_steps

    assert resolved() == 500
    assert resolved(batch_size=2) == resolved(gradient_accumulation_steps=2) == 400


def test_a_number_is_left_alone(make_config):
    cfg = make_config(data={"subject": "no such folder", "class_name": "toy"})
    assert resolve_steps(cfg) == (cfg, None)


def test_a_run_begins_with_auto_and_goes_on_with_the_number(
    make_config, tmp_path, subject, calls, capsys, monkeypatch
):
    monkeypatch.setattr(presets, "FEWEST", 7)  # 400 tiny steps take too long
    monkeypatch.setattr(presets, "STEPS_A_PHOTO", 1)
    own = tmp_path / "photos"
    own.mkdir()
    for path in subject.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    sections = {
        "data": {"subject": str(own), "cache": False},
        "train": {"steps": "auto", "batch_size": 1, "lr_schedule": "cosine"},
    }
    whole = make_config(**sections, output={"dir": str(tmp_path / "whole")})
    dreambooth.run(whole)
    assert "train.steps = auto: 10 steps, for 3 photos and 1 picture a step" in (
        capsys.readouterr().out
    )
    calls.at[calls.count + 4] = interrupt()
    with pytest.raises(TrainingInterrupted):
        dreambooth.run(make_config(**sections))
    assert load_run(tmp_path / "run").train.steps == 10
    monkeypatch.setattr(presets, "STEPS_A_PHOTO", 9)  # another rule, or more photos since
    dreambooth.run(load_run(tmp_path / "run"), resume=True)
    assert_same(trained(tmp_path / "run"), trained(tmp_path / "whole"))
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["step"] == 10


def test_photos_are_needed_to_count_them(make_config):
    with pytest.raises(ValueError, match="data.subject"):
        resolve_steps(make_config(data={"subject": "nowhere"}, train={"steps": "auto"}))
