"""The two commands, as a user meets them."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from nora_diffusion.cli import INTERRUPTED, USER_ERROR, main, main_dreambooth
from nora_diffusion.config import DreamboothConfig, load_config, shipped_configs
from nora_diffusion.events import EventLog, read_events
from nora_diffusion.schema import list_keys
from nora_diffusion.settings import quote, validate

KEYS = list_keys(DreamboothConfig)


def save_photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photos and a broken one."""
    folder = save_photos(tmp_path / "photos", 2)
    (folder / "broken.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def settings(photos, tmp_path) -> list[str]:
    """What every shipped config can be started with."""
    subject = ["--data.subject", str(photos), "--data.class_name", "toy"]
    return [*subject, "--output.dir", str(tmp_path / "run")]


def dry_run(capsys, *argv: str) -> DreamboothConfig:
    assert main_dreambooth([*argv, "--dry-run"]) == 0
    values = tomllib.loads(capsys.readouterr().out)
    return validate(DreamboothConfig, values, "dry run")


def refused(capsys, *argv: str) -> str:
    """The message a command ends with; it must be the only output."""
    assert main_dreambooth([*argv]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configs_launch_command_dry_runs_offline_and_writes_nothing(
    name, photos, tmp_path, capsys, monkeypatch
):
    """Its first line as it stands, but for the photos: the settings, and how much memory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    first = shipped_configs()[name].read_text(encoding="utf-8").splitlines()[0]
    words = shlex.split(first.removeprefix("# nora-dreambooth "))
    assert words[0] == name
    words[words.index("--data.subject") + 1] = str(photos)
    words += ["--model.device", "cpu", "--train.steps", "7"]
    assert main_dreambooth([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    config = validate(DreamboothConfig, tomllib.loads(out), "dry run")
    assert config == load_config(name, words[1:])
    assert "# predicted memory: " in out and "unknown" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_dry_run_says_what_is_in_the_photo_folder(settings, capsys):
    assert main_dreambooth(["mini", *settings, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# 2 photos in" in out and "#   broken.jpg: empty (0 bytes)" in out


def test_config_may_be_a_path_and_flags_may_come_first(settings, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_text("[train]\nsteps = 3\n")
    assert dry_run(capsys, *settings, "--train.seed=4", str(path)).train.steps == 3


def test_all_mistakes_are_told_at_once_whatever_their_place(settings, capsys):
    message = refused(capsys, "--train.stpes", "300", "mini", *settings, "--steps=4", "--data.flip")
    head, *problems = message.splitlines()
    assert head == "nora-dreambooth: error: 3 problems in mini and the command line:"
    assert sorted(problems) == [
        "  data.flip: needs a value; write --data.flip value",
        '  steps = "4": unknown; did you mean train.steps or sample.steps?',
        '  train.stpes = "300": unknown; did you mean train.steps?',
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "CONFIG: missing; give a TOML file or a shipped config: flux, flux2_klein, mini, m"),
        (["minni"], "; did you mean mini?"),
        (["--resume", "none"], '--resume "none": no such folder; give the folder of a run'),
        (["--resume", "."], '--resume ".": holds no config.toml; give the folder of a run'),
        (["--resume", __file__], "a file, where a run folder is asked for"),
        (["mini", "--data.subject", "dogs"], "data.class_name: missing; give it as --data.cl"),
        (["mini", "--dry-runn"], "dry-runn: unknown; sections: model, adapter"),
        (["mini", "sd15"], "sd15: not a setting; write --section.key value"),
        (["sd15"], "data.subject: missing; give it as --data.subject (Folder with"),
    ],
)  # fmt: skip
def test_messages(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    "wrong", [["--adapter.target_modules", "nothing"], ["--model.base", "nowhere/"]]
)
def test_a_dry_run_refuses_what_the_run_would(settings, wrong, capsys):
    assert main_dreambooth(["mini", *settings, *wrong, "--dry-run"]) == USER_ERROR
    assert wrong[0].removeprefix("--") + " = " in capsys.readouterr().err


def test_missing_photos_are_told_by_a_dry_run(settings, tmp_path, capsys):
    argv = ["mini", *settings, "--data.subject", str(tmp_path / "none"), "--dry-run"]
    assert main_dreambooth(argv) == USER_ERROR
    assert "data.subject = " in capsys.readouterr().err


def test_help_lists_every_key_with_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # or long words are broken at hyphens
    with pytest.raises(SystemExit) as stop:
        main_dreambooth(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    flat = " ".join(out.split())
    for key in KEYS:
        default = "required" if key.required else f"default {quote(key.default)}"
        assert f"--{key.name} V {key.help} ({key.allowed}; {default})" in flat
    assert out.isascii()  # Windows consoles still have code pages


def test_a_folder_with_a_run_or_other_files_is_refused(settings, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert dry_run(capsys, "mini", *settings).output.dir == str(run)
    (run / "thesis.doc").write_text("")
    assert "holds other files and no run" in refused(capsys, "mini", *settings)
    argv = ["mini", *settings, "--resume", str(run)]
    assert "holds other files and no run" in refused(capsys, *argv)
    (run / "config.toml").write_text("")
    message = refused(capsys, "mini", *settings)
    assert f"continue it with nora-dreambooth --resume {run}" in message


def test_resume_of_nothing_starts_there(settings, tmp_path, capsys):
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        config = dry_run(capsys, "mini", *settings, "--resume", str(folder))
        assert config.output.dir == str(folder)


def test_resume_takes_the_runs_own_settings(settings, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    changed = ["--adapter.r", "16", "--train.steps", "50"]
    assert main_dreambooth(["mini", *settings, *changed, "--dry-run"]) == 0
    (run / "config.toml").write_text(capsys.readouterr().out)

    config = dry_run(capsys, "--resume", str(run), "--train.steps", "60")
    assert (config.adapter.r, config.train.steps) == (16, 60)
    assert main_dreambooth(["mini", "--resume", str(run), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert tomllib.loads(out)["adapter"]["r"] == 16
    assert f"own settings ({run / 'config.toml'}), not mini" in err
    message = refused(capsys, "--resume", str(run), "--adapter.r", "8")
    assert "adapter.r = 8: this run was started with 16" in message


def test_programming_errors_are_not_passed_off_as_the_users(settings, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("nora_diffusion.train.photos.read_photos", broken)
    with pytest.raises(ZeroDivisionError):
        main_dreambooth(["mini", *settings, "--dry-run"])


def test_a_closed_pipe_is_no_error():
    code = (
        "import sys; from nora_diffusion.cli import main_dreambooth as m; sys.exit(m(['--help']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from tests.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fast(base, tmp_path_factory):
    """A config for a run of two steps, without the disk cache."""
    photos = save_photos(tmp_path_factory.mktemp("subject") / "photos", 2)
    config = photos.parent / "tiny.toml"
    config.write_text(
        f'model = {{ base = "{base}", device = "cpu" }}\n'
        f'data = {{ subject = "{photos}", class_name = "toy", cache = false }}\n'
        "adapter = { r = 8, inner_r = 2 }\n"
        "train = { steps = 2, batch_size = 1, log_every = 1 }\n"
        'sample = { prompts = ["a {trigger} {class_name}"], n = 1, steps = 2 }\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORA_CACHE_DIR", "")
        yield [str(config)]


@pytest.fixture(scope="module")
def finished(fast, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main_dreambooth([*fast, "--output.dir", str(run)]) == 0
    return run


def test_a_run_leaves_its_resolved_config(finished, fast):
    config = load_config(finished / "config.toml")
    assert config == load_config(fast[0], ["--output.dir", str(finished)])
    assert read_events(finished / "events.jsonl")[-1]["event"] == "done"


def test_info(finished, base, capsys):
    assert main(["info", str(finished), "--json", "--base", str(base)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["trigger"], info["class_name"], info["steps"]) == ("sks", "toy", 2)
    assert info["fingerprints_ok"] is True
    assert main(["info", str(finished / "adapter.safetensors")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["trainable_parameters"] == str(info["trainable_parameters"])
    assert lines["fingerprints_ok"] == "-"


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_export(finished, tmp_path, capsys, layout):
    from safetensors import safe_open

    out = tmp_path / ("folder" if layout == "peft" else "lora.safetensors")
    argv = ["export", str(finished), "--out", str(out), "--layout", layout, "--dtype", "fp16"]
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(out)
    file = out / "adapter_model.safetensors" if layout == "peft" else out
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(".alpha")]
        assert {str(tensors.get_tensor(name).dtype) for name in names} == {"torch.float16"}
    part = {"diffusers": "unet.", "kohya": "lora_unet_", "peft": "base_model."}[layout]
    assert names and all(name.startswith(part) for name in names)


@pytest.mark.parametrize(
    ("layout", "out"),
    [("diffusers", "notes/x.safetensors"), ("kohya", "notes/x.safetensors"), ("peft", "notes")],
)
def test_export_to_a_place_that_is_none_names_the_option(finished, tmp_path, capsys, layout, out):
    (tmp_path / "notes").touch()
    argv = ["export", str(finished), "--layout", layout, "--out", str(tmp_path / out)]
    assert main(argv) == USER_ERROR
    assert f"--out {tmp_path / out}: " in (err := capsys.readouterr().err) and "is a file" in err


def test_sample(finished, tmp_path, capsys):
    out = tmp_path / "pictures"
    argv = ["sample", str(finished), "a {trigger} {class_name} on the beach", "a dog"]
    assert main([*argv, "--n", "2", "--seed", "5", "--steps", "2", "--out", str(out)]) == 0
    files = capsys.readouterr().out.split("\n")[:-1]
    assert sorted(files) == sorted(str(path) for path in out.iterdir()) and len(files) == 4
    with Image.open(files[1]) as image:
        assert image.info["prompt"] == "a sks toy on the beach" and image.info["seed"] == "6"
        assert "AI-generated" in image.info.values()


def test_targets_counts_what_an_adapter_trains(finished, base, capsys):
    assert main(["info", str(finished), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert main(["targets", str(base), "--r", "8", "--inner-r", "2", "--modules"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    counted = (
        f"{info['modules']} modules, NoRA r 8 inner r 2 trains {info['trainable_parameters']:,}"
    )
    assert heads[0].startswith(f"unet, attention: {counted}, LoRA r 16 ")
    names = [line.partition(":")[0] for line in heads]
    assert names == ["unet, attention", "unet, feed_forward", "unet, convolution", "text_encoder"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "nowhere"], "nowhere: no such file"),
        (["sample", "nowhere", "a dog"], "nowhere: no such file"),
        (["export", "nowhere", "--out", "x"], "nowhere: no such file"),
        (["info", "notes.txt"], "notes.txt: "),
        (["targets", "nowhere"], 'MODEL = "nowhere": there is no such file or folder'),
        (["sample", "one", "notes", "a dog"], 'PROMPT = "notes": is the folder of a run'),
        (["sample", "one", "a dog", "b.safetensors"], 'PROMPT = "b.safetensors": is an adapter'),
        (["inspect", "one", "--out", "notes.txt"], "--out notes.txt: is a file; give another"),
        (["inspect", "one", "--out", "notes.txt/x"], "--out notes.txt/x: notes.txt is a file"),
        (["campaign", "t.csv", "--out", "notes.txt", "--dry-run"], "notes.txt: is a file; give"),
    ],
)
def test_the_users_mistakes_end_in_one_message(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("these are notes")
    Path("b.safetensors").touch()
    Path("notes").mkdir()
    Path("notes/config.toml").touch()
    assert main(argv) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nora: error: ") and message in err


def test_a_stop_outside_of_training_says_so_too(capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nora_diffusion.adapter.files.adapter_info", stop)
    monkeypatch.setattr("nora_diffusion.adapter_info", stop, raising=False)
    assert main(["info", __file__]) == INTERRUPTED
    assert capsys.readouterr().err == "\nnora: stopped\n"


def test_sigterm_ends_a_command_as_ctrl_c_does():
    code = (
        "import os, signal, sys, time\n"
        "from nora_diffusion import cli\n"
        "def command(argv):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "code = cli._guard('nora', command, [])\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "\nnora: stopped\n")


def test_ctrl_c_says_how_to_resume_and_that_works(fast, tmp_path):
    run = tmp_path / "my run"
    argv = [*fast, "--output.dir", str(run), "--train.steps", "100000"]
    code = "import sys; from nora_diffusion.cli import main_dreambooth as m; sys.exit(m())"
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE)
    try:
        while not any(e["event"] == "step" for e in read_events(run / "events.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED
    assert f"nora-dreambooth --resume '{run}'" in err.decode()
    assert "Traceback" not in err.decode()
    *_, stopped = read_events(run / "events.jsonl")
    assert stopped["event"] == "stopped" and stopped["step"] is not None
    argv = ["--resume", str(run), "--train.steps", str(stopped["step"] + 1)]
    assert main_dreambooth(argv) == 0
    assert (run / "adapter.safetensors").is_file()


def test_a_start_that_fails_leaves_no_folder_in_the_way(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    for wrong in (
        ["--data.subject", str(tmp_path / "empty")],
        [
            "--data.subject",
            str(Path(__file__).parents[1] / "sample_data/subject"),
            "--model.base",
            str(tmp_path / "none.safetensors"),
        ],
    ):
        command = ["mini", "--data.class_name", "toy", "--output.dir", str(run), *wrong]
        assert main_dreambooth(command) == 2
        assert not run.exists(), capsys.readouterr().err


def test_a_resume_that_fails_leaves_the_runs_own_settings(tmp_path, capsys):
    run = tmp_path / "run"
    command = [
        "mini",
        "--data.subject",
        str(Path(__file__).parents[1] / "sample_data/subject"),
        "--data.class_name",
        "toy",
    ]
    brief = ["--train.steps", "1", "--sample.n", "1", "--sample.steps", "1"]
    assert main_dreambooth([*command, *brief, "--output.dir", str(run)]) == 0
    before = (run / "config.toml").read_bytes()
    assert main_dreambooth(["--resume", str(run), "--data.subject", str(tmp_path / "none")]) == 2
    assert (run / "config.toml").read_bytes() == before


def test_a_damaged_base_is_told_with_its_key(fast, base, tmp_path, capsys):
    """And the command with a whole one may use the same run folder."""
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    run = tmp_path / "run"
    command = [*fast, "--model.base", str(broken), "--output.dir", str(run)]
    for path, data in (
        ("model_index.json", b"{"),
        ("unet/config.json", b""),
        ("tokenizer/tokenizer_config.json", b"\xff\xfe"),
        ("vae/config.json", None),
        ("unet/diffusion_pytorch_model.safetensors", b"\x00" * 100),
        ("text_encoder/model.safetensors", b"cut"),
    ):
        whole = (broken / path).read_bytes()
        (broken / path).unlink()
        if data is not None:
            (broken / path).write_bytes(data)
        assert main_dreambooth(command) == USER_ERROR, path
        err = capsys.readouterr().err
        assert "error: model.base" in err and "download or copy it again" in err, path
        assert "Traceback" not in err
        (broken / path).write_bytes(whole)
    assert main_dreambooth([*fast, "--output.dir", str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"finished; everything is in {run}\n")
    assert tomllib.loads((run / "config.toml").read_text())["model"]["base"] == str(base)
    assert read_events(run / "events.jsonl")[-1]["event"] == "done"


def test_a_base_that_answers_nan_is_told_apart_from_a_learning_rate(fast, base, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += float("nan")
    save_file(tensors, weights)
    run = ["--model.base", str(broken), "--output.dir", str(tmp_path / "run")]
    assert main_dreambooth([*fast, *run]) == USER_ERROR
    err = capsys.readouterr().err
    assert f'the answer of model.base = "{broken}" itself' in err
    assert "train.learning_rate" not in err


def test_a_run_that_is_under_way_is_not_taken_for_a_failed_start(fast, tmp_path, capsys):
    """Its last event is no error, or it has a checkpoint."""
    run = tmp_path / "run"
    assert main_dreambooth([*fast, "--output.dir", str(run), "--adapter.target_modules", "no"]) == 2
    assert "adapter.target_modules" in capsys.readouterr().err
    before = (run / "events.jsonl").read_bytes()
    EventLog(run / "events.jsonl").write("start")
    assert "already holds a run" in refused(capsys, *fast, "--output.dir", str(run))
    (run / "events.jsonl").write_bytes(before)
    (run / "checkpoints/step-1").mkdir(parents=True)
    assert "already holds a run" in refused(capsys, *fast, "--output.dir", str(run))
    (run / "checkpoints/step-1").rmdir()
    assert dry_run(capsys, *fast, "--output.dir", str(run)).output.dir == str(run)
