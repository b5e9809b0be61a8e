"""Presets: what they are made of, where they stand in the order, that they fit their cards."""

import tomllib
from pathlib import Path

import pytest

from nora_diffusion.cli import USER_ERROR, main_dreambooth
from nora_diffusion.config import (
    ConfigError,
    DreamboothConfig,
    load_config,
    load_run,
    save_config,
    shipped_configs,
)
from nora_diffusion.presets import PRESETS
from nora_diffusion.schema import get_key, list_keys

KEYS = {key.name for key in list_keys(DreamboothConfig)}
SUBJECT = Path(__file__).parent.parent / "sample_data" / "subject"
SETTINGS = ["--data.subject", str(SUBJECT), "--data.class_name", "toy"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_choice_is_a_known_key_with_one_sentence(name):
    keys = [choice.key for choice in PRESETS[name]]
    assert set(keys) <= KEYS and len(set(keys)) == len(keys)
    for choice in PRESETS[name]:
        assert choice.why[0].isupper() and choice.why.endswith(".") and ". " not in choice.why
        assert choice.why.isascii() and "|" not in choice.why


@pytest.mark.parametrize("config", shipped_configs())
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_with_every_shipped_config(config, preset):
    resolved = load_config(config, SETTINGS, preset)
    assert all(get_key(resolved, choice.key) == choice.value for choice in PRESETS[preset])
    assert resolved.train.batch_size * resolved.train.gradient_accumulation_steps == 4
    others = KEYS - {choice.key for choice in PRESETS[preset]}
    plain = load_config(config, SETTINGS)
    assert all(get_key(resolved, name) == get_key(plain, name) for name in others)


def test_the_command_line_goes_before_a_preset_before_the_file(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nbatch_size = 7\nsteps = 9\n[model]\ndtype = 'fp32'\n")
    config = load_config(file, [*SETTINGS, "--train.batch_size", "3"], "8gb")
    assert (config.train.batch_size, config.train.steps, config.model.dtype) == (3, 9, "bf16")
    assert config.train.gradient_accumulation_steps == 4
    file.write_text("train = 3\n")
    with pytest.raises(ConfigError, match="train = 3: must be a section of keys"):
        load_config(file, SETTINGS, "8gb")


@pytest.mark.parametrize(
    ("given", "near"), [("8GB", "8gb"), ("18gb", "8gb"), ("24g", "24gb"), ("12", "12gb")]
)
def test_an_unknown_preset_is_refused_with_the_nearest(given, near, capsys):
    assert main_dreambooth(["mini", *SETTINGS, "--preset", given]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and f"the presets are {', '.join(PRESETS)}; did you mean {near}?" in err


def test_a_dry_run_shows_the_preset_and_what_the_command_line_made_of_it(capsys):
    argv = ["sd15", *SETTINGS, "--preset", "12gb", "--train.batch_size", "3"]
    assert main_dreambooth([*argv, "--train.steps", "auto", "--dry-run"]) == 0
    out = capsys.readouterr().out
    values = tomllib.loads(out)
    assert values["train"]["gradient_accumulation_steps"] == 2
    assert values["train"]["steps"] == 400
    assert "# --preset 12gb:" in out
    lines = [line for line in out.splitlines() if line.startswith("#   ")]
    for choice in PRESETS["12gb"]:
        (line,) = [line for line in lines if choice.key in line]
        assert choice.why in line
        assert line.endswith("Here 3, from the command line.") == (choice.key == "train.batch_size")
    assert "# train.steps = auto: 400 steps, for 5 photos and 6 pictures a step" in out


def test_help_lists_every_choice(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main_dreambooth(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name, choices in PRESETS.items():
        assert f"--preset {name}: {' '.join(map(str, choices))}" in out


def test_the_same_command_with_its_preset_resumes_a_run_and_another_does_not(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    save_config(load_config("mini", [*SETTINGS, "--output.dir", str(run)], "12gb"), run)
    assert load_run(run, SETTINGS, "12gb") == load_run(run)
    with pytest.raises(ConfigError, match="train.batch_size = 1: this run was started with 2"):
        load_run(run, [], "8gb")


@pytest.mark.parametrize(
    "preset", ["8gb", *(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS if p != "8gb")]
)
def test_training_fits_the_card(preset):
    """SD 1.5 as a whole, and the steps of SDXL (its text encoders need 9.8 GB before them)."""
    from nora_diffusion.train.memory import plan_memory

    card = int(preset.removesuffix("gb")) * 1e9
    small, large = (
        plan_memory(load_config(name, [*SETTINGS, "--model.device", "cpu"], preset), pictures=20)
        for name in ("sd15", "sdxl")
    )
    assert small.peak < 0.5 * card
    assert large.training < 0.9 * card
