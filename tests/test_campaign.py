"""``nora campaign``: the table as a user writes it, and runs of mini on local Ray."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nora_diffusion.campaign.subjects import read_table
from nora_diffusion.cli import FAILED, INTERRUPTED, USER_ERROR, main
from nora_diffusion.config import load_config, save_config
from nora_diffusion.events import read_events

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "sample_data" / "subject"
BRIEF = [
    "--model.device=cpu", "--train.steps=5", "--train.batch_size=1", "--train.log_every=1",
    "--train.checkpoint_every=1", "--train.lr_warmup_steps=1", "--adapter.r=8",
    "--adapter.inner_r=2", "--adapter.targets=attention", "--text_encoder.train=false",
    '--sample.prompts=["a {trigger} {class_name}"]', "--sample.n=1", "--sample.steps=1",
]  # fmt: skip
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray, the extra of that name, is not installed"
)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(capsys, *argv: str) -> str:
    assert main(["campaign", *argv]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_all_problems_of_all_lines_are_told_at_once_and_nothing_starts(tmp_path, capsys):
    path = table(
        tmp_path / "subjects.csv",
        "subject,class_name,name,train.steps,adapter.r",
        f"{PHOTOS},toy,a,4,",
        f"{tmp_path / 'nowhere'},toy,A,many,",
        "",
        f"{PHOTOS},,b/c,,2",
    )
    message = refused(capsys, str(path), "--out", str(tmp_path / "out"))
    head, *problems = message.splitlines()
    assert head == f"nora: error: 6 problems in {path}:"
    starts = [
        'line 3: name "A": line 2 has it too',
        f'line 3: subject = "{tmp_path / "nowhere"}": no such folder',
        'line 3: train.steps = "many": must be a whole number',
        "line 5: class_name: missing",
        'line 5: name = "b/c": must be letters',
        "line 5: adapter.inner_r = 8: must be at most adapter.r = 2",
    ]
    assert len(problems) == len(starts)
    for start in starts:
        assert any(problem.strip().startswith(start) for problem in problems), start
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", [], "is empty"),
        ("subject,class_name\n", [], "no line below the header"),
        ("subject;class_name\nx;dog\n", [], "parted by commas"),
        ("subject\tclass_name\nx\tdog\n", [], "parted by commas, not by tabs"),
        ("subject,class_name,train.stpes\nx,dog,4\n", [],
         '"train.stpes": unknown; did you mean train.steps?'),
        ("Subject,class_name\nx,dog\n", [], '"Subject": unknown; did you mean subject?'),
        ("data.subject,class_name\nx,dog\n", [], "call it subject"),
        ("subject,class_name\nx,dog,a,b\n", [], "line 2: 4 cells, but 2 columns"),
        ("subject,class_name\nx,dog\n", ["--data.subject", "y"], "give it in the column subject"),
        ("subject,class_name\nx,dog\n", ["--train.steps", "0"], 'train.steps = "0": must be'),
        ("subject,class_name\nx,dog\n", ["--config", "minni"], "did you mean mini?"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_whole_table_is_told_once(tmp_path, capsys, text, flags, message):
    path = tmp_path / "subjects.csv"
    path.write_text(text, encoding="utf-8")
    told = refused(capsys, str(path), *flags)
    assert told.count(message) == 1 and "line 2: subject" not in told


@pytest.mark.parametrize("name", ["summary.csv", "a.log", "A.LOG"])
def test_a_name_that_a_file_of_the_campaign_has_is_refused(tmp_path, capsys, name):
    path = table(
        tmp_path / "s.csv", "subject,class_name,name", f"{PHOTOS},toy,a", f"{PHOTOS},toy,{name}"
    )
    told = refused(capsys, str(path), "--out", str(tmp_path / "out"), "--dry-run")
    assert f'line 3: name = "{name}": the campaign keeps summary.csv and a log NAME.log' in told


def test_a_folder_of_photos_called_as_a_log_needs_a_name(tmp_path, capsys):
    shutil.copytree(PHOTOS, tmp_path / "x.log")
    path = table(tmp_path / "s.csv", "subject,class_name", f"{tmp_path / 'x.log'},toy")
    assert 'line 2: name = "x.log": the campaign keeps' in refused(capsys, str(path))
    path = table(tmp_path / "s.csv", "subject,class_name,name", f"{tmp_path / 'x.log'},toy,x")
    assert [run.name for run in read_table(path, "mini", [], None, tmp_path / "out")] == ["x"]


def test_a_dry_run_tells_once_what_does_not_fit_the_base(tmp_path, capsys):
    path = table(
        tmp_path / "s.csv",
        "subject,class_name,name,adapter.target_modules",
        *(f"{PHOTOS},toy,{name},{given}" for name, given in (("a", ""), ("b", "x"), ("c", "x"))),
    )
    told = refused(capsys, str(path), "--out", str(tmp_path / "out"), "--dry-run")
    assert "1 problem" in told
    assert "line 3 (and 1 more with the same settings): adapter.target_modules = ['x']" in told
    assert not (tmp_path / "out").exists()


def test_a_line_of_spaces_is_an_empty_line(tmp_path):
    path = table(tmp_path / "s.csv", "  ", "subject,class_name", "   ", f"{PHOTOS},toy", " , ")
    (run,) = read_table(path, "mini", [], None, tmp_path / "out")
    assert run.line == 4


def test_retries_below_zero_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["campaign", "s.csv", "--retries", "-1"])
    assert "--retries: -1: must be 0 to 99" in capsys.readouterr().err


def test_a_cell_goes_before_the_command_line_and_an_empty_one_changes_nothing(tmp_path):
    path = table(
        tmp_path / "subjects.csv",
        "subject,class_name,trigger,train.steps,sample.prompts,name",
        f'{PHOTOS},toy,zwx,7,"[""one, two"", ""three""]",first',
        f"{PHOTOS}/,dog,,,,",
    )
    flags = ["--train.steps", "3", "--sample.prompts", "shared", "--train.seed", "5"]
    first, second = read_table(path, "mini", flags, "8gb", tmp_path)
    for run in (first, second):
        # What nora-dreambooth is started with gives the settings that were checked.
        argv = [*run.overrides, f"--output.dir={run.folder}"]
        assert load_config("mini", argv, "8gb") == run.config
        assert run.config.train.seed == 5 and run.config.train.batch_size == 1
    assert (first.name, second.name) == ("first", "subject")
    assert (first.config.data.trigger, second.config.data.trigger) == ("zwx", "sks")
    assert (first.config.train.steps, second.config.train.steps) == (7, 3)
    assert first.config.sample.prompts == ("one, two", "three")
    assert second.config.sample.prompts == ("shared",)


def test_a_run_that_is_there_must_be_the_one_of_its_line(tmp_path, capsys):
    out = tmp_path / "out"
    path = table(
        tmp_path / "s.csv", "subject,class_name,name", f"{PHOTOS},toy,a", f"{PHOTOS},dog,b"
    )
    for run in read_table(path, "mini", ["--adapter.r=16"], None, out):
        run.folder.mkdir(parents=True)
        if run.name == "a":
            save_config(run.config, run.folder)
    (out / "b" / "thesis.doc").touch()
    told = refused(capsys, str(path), "--out", str(out))
    assert "line 2: adapter.r = 160: the run in" in told and "was started with 16" in told
    assert f"line 3: {out / 'b'}: holds other files and no run" in told
    shutil.rmtree(out / "b")
    assert main(["campaign", str(path), "--out", str(out), "--adapter.r", "16", "--dry-run"]) == 0
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == [["a", "waiting"], ["b", "waiting"]]
    assert sorted(path.name for path in out.iterdir()) == ["a"]


@needs_ray
def test_an_address_where_nobody_answers_is_told_and_another_campaign_kept_out(tmp_path, capsys):
    from filelock import FileLock

    out = tmp_path / "out"
    path = table(tmp_path / "s.csv", "subject,class_name", f"{PHOTOS},toy")
    argv = [str(path), "--out", str(out)]
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert main(["campaign", *argv, "--ray", address]) == USER_ERROR
    assert f"--ray {address}: nobody answers there" in capsys.readouterr().err
    with FileLock(out / ".campaign.lock"):
        assert main(["campaign", *argv]) == USER_ERROR
    assert "another nora campaign works there" in capsys.readouterr().err


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """Starts ``nora campaign`` in a process of its own; ended, with its Ray, after the test."""
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "cache"))
    started: list[subprocess.Popen[str]] = []

    def start(*argv: str) -> subprocess.Popen[str]:
        code = "import sys; from nora_diffusion.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "campaign", *argv]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def ray_worker_of(run: str) -> int:
    """The process that started the one that works on a run."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = (stat.parent / "cmdline").read_bytes().split(b"\0")
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if run.encode() in words and b"--resume" in words:
            return int(fields[1])
    raise AssertionError(f"nothing works on {run}")


def summary(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "summary.csv", encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def trained(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter.safetensors")


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the Ray worker through /proc")
def test_a_killed_worker_costs_an_attempt_and_a_failing_subject_stops_no_other(campaign, tmp_path):
    out = tmp_path / "out"
    path = table(
        tmp_path / "subjects.csv",
        "subject,class_name,name,model.base",
        f"{PHOTOS},toy,killed,",
        f"{PHOTOS},toy,broken,{tmp_path / 'no-base'}",
        f"{PHOTOS},toy,smooth,",
    )
    argv = [str(path), "--out", str(out), "--parallel", "1", *BRIEF]
    process = campaign(*argv)
    run = out / "killed"
    wait_for(lambda: list(run.glob("checkpoints/step-*")), process)
    os.kill(ray_worker_of(str(run)), signal.SIGKILL)
    told = process.communicate()[0]
    assert process.returncode == FAILED, told
    rows = summary(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        "killed": "done", "broken": "failed", "smooth": "done",
    }  # fmt: skip
    assert {name: row["attempts"] for name, row in rows.items()} == {
        "killed": "2", "broken": "1", "smooth": "1",
    }  # fmt: skip
    assert "its Ray worker died" in told and "no-base" in rows["broken"]["message"]
    assert rows["smooth"]["steps"] == "5" and float(rows["smooth"]["last_loss"]) > 0
    assert rows["smooth"]["adapter"] == str(out / "smooth" / "adapter.safetensors")
    # The process its Ray worker left behind has stopped, and the next went on after it. Ray may
    # signal it too, and a second signal stops it at once, so its last step need not be saved.
    events = read_events(run / "events.jsonl")
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1]
    order = [event["event"] for event in events if event["event"] in ("start", "stopped", "done")]
    assert order == ["start", "stopped", "start", "done"]
    killed, smooth = trained(out, "killed"), trained(out, "smooth")
    assert killed.keys() == smooth.keys()
    assert all(torch.equal(killed[name], smooth[name]) for name in killed)

    # Once more: finished runs are left alone, the failed one gets another attempt.
    before = {name: (out / name / "events.jsonl").read_bytes() for name in ("killed", "smooth")}
    again = campaign(*argv)
    told = again.communicate()[0]
    assert again.returncode == FAILED and "3 subjects, 2 done before" in told
    assert {n: (out / n / "events.jsonl").read_bytes() for n in before} == before
    rows = summary(out)
    assert (rows["broken"]["attempts"], rows["killed"]["attempts"]) == ("2", "2")


@needs_ray
@pytest.mark.slow
def test_ctrl_c_lets_runs_save_and_the_same_command_finishes_them(campaign, tmp_path):
    out = tmp_path / "out"
    lines = [f"{PHOTOS},toy,{name}" for name in ("first", "second")]
    path = table(tmp_path / "subjects.csv", "subject,class_name,name", *lines)
    argv = [str(path), "--out", str(out), "--parallel", "1", *BRIEF]
    long = [*argv, "--train.steps", "100000", "--train.checkpoint_every", "0"]
    process = campaign(*long)
    log = out / "first" / "events.jsonl"
    wait_for(lambda: any(event["event"] == "step" for event in read_events(log)), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray and the run as well
    told = process.communicate()[0]
    assert process.returncode == INTERRUPTED, told
    assert "stopped; continue with: nora campaign" in told
    rows = summary(out)
    assert [row["status"] for row in rows.values()] == ["stopped", "waiting"]
    step = read_events(log)[-1]["step"]
    assert step and (out / "first" / "checkpoints" / f"step-{step}").is_dir()
    assert not list(out.glob(".session-*"))

    again = campaign(*argv, "--train.steps", str(step + 1))
    told = again.communicate()[0]
    assert again.returncode == 0, told
    rows = summary(out)
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert [row["attempts"] for row in rows.values()] == ["2", "1"]
    starts = [event["step"] for event in read_events(log) if event["event"] == "start"]
    assert starts == [0, step]
