"""What goes wrong around a run: one message that says what to do, nothing lost, the same bits.

Every case ends in the command that its message names, and in the adapter of a run that nothing
happened to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from PIL import Image
from safetensors.torch import load, load_file, save
from torch.nn.modules.module import register_module_forward_pre_hook

from nora_diffusion import adapter_info
from nora_diffusion.cli import INTERRUPTED, USER_ERROR, main_dreambooth
from nora_diffusion.disk import is_temporary
from nora_diffusion.events import read_events
from nora_diffusion.train import dreambooth
from nora_diffusion.train.checkpoint import newest_checkpoint
from tests.disk import (
    file_size_limit,
    limit_file_size,
    permissions_bind,
    read_only,
    resize_disk,
    small_disk,
)
from tests.train.test_dreambooth import assert_same, interrupt, trained

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def photos(subject, tmp_path) -> Path:
    """Photos of this test alone."""
    return Path(shutil.copytree(subject, tmp_path / "photos"))


@pytest.fixture
def start(base, photos, tmp_path, capsys, monkeypatch) -> Callable[..., Result]:
    """``nora-dreambooth`` on the tiny base: with DIR for a new run, or ``--resume`` for an old."""
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "cache"))
    # It writes nothing and is half of the time a tiny run takes.
    monkeypatch.setattr(dreambooth, "_check_memory", lambda *_: None)
    config = tmp_path / "tiny.toml"
    config.write_text(SETTINGS.format(base=base, photos=photos))

    def run(*argv: str) -> Result:
        words = argv if argv[0] == "--resume" else (str(config), "--output.dir", *argv)
        code = main_dreambooth([*map(str, words)])
        return Result(code, *capsys.readouterr())

    return run


SETTINGS = """
model = {{ base = "{base}", device = "cpu" }}
data = {{ subject = "{photos}", class_name = "toy" }}
adapter = {{ r = 8, inner_r = 2, init = "orthogonal" }}
sample = {{ prompts = ["a {{trigger}} {{class_name}}"], n = 1, steps = 1 }}

[train]
steps = 4
batch_size = 1
checkpoint_every = 2
lr_warmup_steps = 2
log_every = 1
"""


@pytest.fixture(scope="module")
def whole(base, subject, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The adapter of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "tiny.toml"
    config.write_text(SETTINGS.format(base=base, photos=subject))
    assert main_dreambooth([str(config), "--output.dir", str(folder / "run")]) == 0
    return trained(folder / "run")


def assert_told(result: Result, *words: str) -> None:
    """One message, no stack trace."""
    assert result.code == USER_ERROR, result.err
    assert result.err.count("nora-dreambooth: error: ") == 1 and "Traceback" not in result.err
    for word in words:
        assert word in result.err


def assert_whole_files(run: Path) -> None:
    """Nothing unfinished under a final name."""
    for path in run.rglob("*.png"):
        if not is_temporary(path):
            with Image.open(path) as image:
                image.load()
    for path in run.rglob("*.safetensors"):
        if not any(part.startswith(".partial-") for part in path.parts):
            load_file(path)
    if (run / "adapter.safetensors").exists():
        adapter_info(run / "adapter.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged checkpoint would warn, and so a damaged event
        newest_checkpoint(run)
        read_events(run / "events.jsonl")


# ---- full disks -----------------------------------------------------------------------------


class Full(NamedTuple):
    """A disk that takes no files of ``most`` bytes from a step on; None: from the start."""

    path: str
    most: int
    from_step: int | None = None
    options: tuple[str, ...] = ()


FULL = {
    "config": Full("config.toml", 1000),
    "a checkpoint": Full("checkpoints/step-4", 20_000, 3),
    "a checkpoint's state": Full("checkpoints/step-4", 5_000, 3, ("--output.lora", "false")),
    "a sheet": Full("samples/step-3.png", 20_000, 3, ("--sample.every", "3")),
    "the adapter": Full("adapter.safetensors", 60_000, None, ("--output.portable", "true")),
    "before and after": Full("before_after.png", 60_000),
}
QUICK = ("config", "a checkpoint", "the adapter")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FULL]
)
def test_a_file_that_does_not_fit_ends_the_run_and_nothing_is_lost(
    start, whole, tmp_path, calls, name
):
    full, run = FULL[name], tmp_path / "run"
    if full.from_step is not None:
        calls.at[full.from_step] = lambda _: limit_file_size(full.most)
    with file_size_limit(full.most if full.from_step is None else 10**9):
        result = start(run, *full.options)
    assert_told(result, f"{run / full.path} cannot be written", "limit on the size of files")
    assert not (run / full.path).exists()
    assert not any(map(is_temporary, run.rglob("*")))
    assert_whole_files(run)
    if full.from_step is not None:
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None and checkpoint.step == 2
    command = f"nora-dreambooth --resume {run}"
    assert command in result.err or not (run / "config.toml").exists()
    again = start("--resume", run) if command in result.err else start(run)
    assert again.code == 0, again.err
    assert_same_numbers(trained(run), whole)


def assert_same_numbers(portable: dict[str, torch.Tensor], compact: dict[str, torch.Tensor]):
    """The inner pairs; a portable file holds the outer ones as well."""
    assert_same({name: portable[name] for name in compact}, compact)


def test_an_event_that_does_not_fit_leaves_no_half_line(start, whole, tmp_path, calls):
    run = tmp_path / "run"
    events = run / "events.jsonl"
    calls.at[3] = lambda _: limit_file_size(events.stat().st_size + 20)
    with file_size_limit(10**9):
        result = start(run)
    assert_told(result, f"{events} cannot be written", f"nora-dreambooth --resume {run}")
    assert events.read_bytes().endswith(b"}\n")
    assert_whole_files(run)
    assert start("--resume", run).code == 0
    assert_same(trained(run), whole)
    assert [e["step"] for e in read_events(events) if e["event"] == "step"] == [1, 2, 3, 4]


def test_a_full_disk_ends_the_run_and_freeing_space_lets_it_go_on(start, whole, tmp_path, calls):
    disk = tmp_path / "disk"
    run = disk / "my run"
    ballast = disk / "ballast"

    def fill(_) -> None:
        with pytest.raises(OSError, match="No space left"), open(ballast, "wb", 0) as file:
            while True:
                file.write(bytes(4096))

    calls.at[3] = fill
    with small_disk(disk, 1000):
        result = start(run)
        told = f"{run / 'checkpoints/step-4'} cannot be written (No space left on device)"
        assert_told(result, told, "free space")
        assert f"nora-dreambooth --resume '{run}'" in result.err
        assert_whole_files(run)
        ballast.unlink()
        assert start("--resume", run).code == 0
        assert_same(trained(run), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192])
def test_disks_of_many_sizes(start, whole, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    run = disk / "run"
    with small_disk(disk, kilobytes):
        result = start(run, "--sample.every", "2")
        assert_told(result, str(disk), "No space left on device")
        assert_whole_files(run)
        resize_disk(disk, 2000)
        resume = f"nora-dreambooth --resume {run}" in result.err
        again = start("--resume", run) if resume else start(run, "--sample.every", "2")
        assert again.code == 0, again.err
        assert_same(trained(run), whole)


# ---- folders that cannot be written ----------------------------------------------------------


def test_a_run_folder_that_cannot_be_made_is_told_with_its_key(start, tmp_path):
    (tmp_path / "file").write_text("")
    parent, locked = tmp_path / "parent", tmp_path / "locked"
    parent.mkdir()
    locked.mkdir()
    for run in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert_told(start(run), f'output.dir = "{run}": ')
    with read_only(parent):
        told = start(parent / "run")
    assert_told(told, f'output.dir = "{parent / "run"}": cannot be made (Permission denied)')
    locked.chmod(0)
    with permissions_bind():
        told = start(locked / "run")
    locked.chmod(0o755)
    assert_told(told, f'output.dir = "{locked / "run"}": cannot be looked into')
    assert not list(parent.iterdir()) and not list(locked.iterdir())


def test_a_run_folder_that_became_read_only_is_told_before_training(start, whole, tmp_path, calls):
    run = tmp_path / "run"
    calls.at[2] = interrupt()
    assert start(run).code == INTERRUPTED
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with read_only(run, run / "checkpoints", run / "checkpoints" / "step-2"):
        result = start("--resume", run)
    assert_told(result, f'output.dir = "{run}": ', "Permission denied", "make the folder writable")
    assert calls.count == 2
    events = run / "events.jsonl"  # the one file that could be written
    assert {path: path.read_bytes() for path in before if path != events} == {
        path: data for path, data in before.items() if path != events
    }
    assert start("--resume", run).code == 0
    assert_same(trained(run), whole)


def test_a_cache_that_cannot_be_written_costs_a_warning(start, whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning) as told:
        result = start(tmp_path / "run")
    assert result.code == 0
    texts = [str(one.message) for one in told]
    for words in ("encoded pictures are not kept in", "cannot cache factors in"):
        assert sum(words in text for text in texts) >= 1
    assert_same(trained(tmp_path / "run"), whole)


def test_class_images_go_to_the_run_where_the_cache_takes_none(start, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (cache / "latents").mkdir(parents=True)
    prior = ("--train.prior", "class_images", "--train.prior_images", "2")
    with read_only(cache, cache / "latents"), pytest.warns(UserWarning) as told:
        result = start(tmp_path / "run", *prior, "--train.steps", "1")
    assert result.code == 0
    assert any("class images are kept in the run folder" in str(one.message) for one in told)
    assert len(list((tmp_path / "run" / "class_images").glob("*.png"))) == 2


# ---- photos ---------------------------------------------------------------------------------


def test_photos_may_go_once_training_has_begun(start, whole, tmp_path, photos, calls):
    calls.at[1] = lambda _: shutil.rmtree(photos)
    assert start(tmp_path / "run").code == 0
    assert_same(trained(tmp_path / "run"), whole)
    with Image.open(tmp_path / "run" / "before_after.png") as image:
        image.load()


@pytest.fixture
def at_first_picture() -> Iterator[list[Callable[[], object]]]:
    """What to do when the autoencoder is handed the first picture."""
    to_do: list[Callable[[], object]] = []

    def hook(module: torch.nn.Module, _) -> None:
        on_meta = any(p.device.type == "meta" for p in module.parameters())
        if isinstance(module, Encoder) and not on_meta:
            while to_do:
                to_do.pop()()

    handle = register_module_forward_pre_hook(hook)
    yield to_do
    handle.remove()


def test_a_photo_that_goes_while_pictures_are_encoded_is_named(
    start, whole, tmp_path, photos, at_first_picture
):
    photo, run = photos / "1.png", tmp_path / "run"
    kept = photo.read_bytes()
    at_first_picture.append(photo.unlink)
    assert_told(start(run), f"{photo}: this photo was there when the run began", "No such file")
    photo.write_bytes(kept)
    # The first picture is in the cache by now; the second, changed, must not get there.
    at_first_picture.append(lambda: photo.write_bytes((photos / "2.png").read_bytes()))
    assert_told(start("--resume", run), f"{photo}: this photo has been changed", "resume")
    photo.write_bytes(kept)
    assert start("--resume", run).code == 0
    assert_same(trained(run), whole)


def test_a_resume_names_the_photos_that_are_no_longer_the_same(
    start, whole, tmp_path, photos, calls
):
    run, photo = tmp_path / "run", photos / "1.png"
    calls.at[2] = interrupt()
    assert start(run).code == INTERRUPTED
    kept, caption = photo.read_bytes(), photo.with_suffix(".txt")
    before = (run / "config.toml").read_bytes()
    changes: list[tuple[Callable[[], object], str]] = [
        (photo.unlink, "1.png: is missing, or cannot be read"),
        (lambda: photo.write_bytes(kept[:-200]), "1.png: is missing, or cannot be read"),
        (lambda: Image.new("RGB", (20, 16)).save(photo), "1.png: is another picture"),
        (
            lambda: caption.write_text("a {trigger} cup"),
            '1.png: its prompt is "a sks cup", was "a sks toy"',
        ),
        (lambda: shutil.copy(photo, photos / "new.png"), "new.png: was not there"),
    ]
    for change, line in changes:
        change()
        told = start("--resume", run)
        assert_told(told, f'data.subject = "{photos}": not what it was', "step-2", f"\n  {line}\n")
        assert told.err.count("\n  ") == 1
        photo.write_bytes(kept)
        for path in (caption, photos / "new.png"):
            path.unlink(missing_ok=True)
    shutil.move(photos, tmp_path / "elsewhere")
    assert_told(start("--resume", run), f'data.subject = "{photos}": no such folder')
    assert (run / "config.toml").read_bytes() == before and calls.count == 2
    assert start("--resume", run, "--data.subject", tmp_path / "elsewhere").code == 0
    assert_same(trained(run), whole)


# ---- files that are spoilt -------------------------------------------------------------------


def spoil(path: Path, number: int) -> None:
    """Damage of one of many kinds."""
    data = path.read_bytes()
    if number % 5 == 0:
        path.write_bytes(b"")
    elif number % 5 == 1:
        path.write_bytes(data[: len(data) // 2])
    elif number % 5 == 2:
        path.write_bytes(os.urandom(len(data)))
    elif number % 5 == 3:
        tensors = load(data)
        path.write_bytes(save({name: t[..., :1].contiguous() for name, t in tensors.items()}))
    else:
        nan = {n: t * float("nan") if t.is_floating_point() else t for n, t in load(data).items()}
        path.write_bytes(save(nan))


def test_a_spoilt_cache_changes_nothing(start, whole, tmp_path):
    assert start(tmp_path / "first").code == 0
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    kinds = {path.relative_to(tmp_path / "cache").parts[0] for path in entries}
    assert len(entries) > 10 and kinds == {"latents", "factors-v1"}
    for number, path in enumerate(entries):
        spoil(path, number)
    with pytest.warns(UserWarning, match="are damaged; they are computed again"):
        assert start(tmp_path / "second").code == 0
    assert_same(trained(tmp_path / "second"), whole)


def test_a_run_goes_on_from_the_last_good_checkpoint(start, whole, tmp_path, calls):
    run = tmp_path / "run"
    calls.at[3] = interrupt()
    assert start(run, "--train.checkpoint_every", "1").code == INTERRUPTED
    state = run / "checkpoints" / "step-3" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "step": 4}))
    events = run / "events.jsonl"
    events.write_bytes(b"\x00\xff\n" + events.read_bytes() + b'{"half')
    with pytest.warns(UserWarning, match="step-3 is damaged .* passed over"):
        assert start("--resume", run).code == 0
    assert calls.count == 3 + 2
    assert_same(trained(run), whole)
    with pytest.warns(UserWarning, match="events.jsonl, line 1: not an event"):
        assert read_events(events)[-1]["event"] == "done"


def test_a_spoilt_config_can_be_written_again(start, whole, tmp_path, calls):
    run = tmp_path / "run"
    calls.at[2] = interrupt()
    assert start(run).code == INTERRUPTED
    config = run / "config.toml"
    for text in ("", "data = 3\noutput = 4\n", "[train\nsteps = 4", config.read_text()[:-300]):
        config.write_text(text)
        assert_told(start("--resume", run), str(config), "--dry-run")
    printed = start(tmp_path / "other", "--dry-run").out
    wrong = printed.replace("inner_r = 2", "inner_r = 1", 1)
    config.write_text(wrong)
    assert_told(start("--resume", run), "adapter.inner_r = 1, was 2")
    config.write_text(printed)
    assert start("--resume", run).code == 0
    assert_same(trained(run), whole)


# ---- kills ----------------------------------------------------------------------------------


_STARTER = """
import json, os, signal, sys, time
from nora_diffusion.cli import main_dreambooth
from nora_diffusion.train import dreambooth
dreambooth._check_memory = lambda *_: None
print("ready", flush=True)
for line in sys.stdin:  # a delay in seconds, or null: to be left alone
    delay, argv = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            code = main_dreambooth(argv)
        except BaseException:
            code = 99
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)
    status = None
    while status is None:
        if delay is not None and time.monotonic() - began > delay:
            os.kill(child, signal.SIGKILL)
            delay = None
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.001)
    print(json.dumps([status, time.monotonic() - began]), flush=True)
"""


class Starter:
    """Starts the command in processes that need not import torch first, and kills them."""

    def __init__(self, log: Path, cache: Path) -> None:
        self.log = open(log, "wb")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # a process with threads of OpenMP cannot be forked
            "NORA_CACHE_DIR": str(cache),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _STARTER], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        while (line := self._answer()) != "ready\n":
            assert line, log.read_text()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self, delay_s: float | None, *argv: str) -> tuple[int, float]:
        """Exit code, negative of a signal, and seconds."""
        assert self.process.stdin is not None
        print(json.dumps([delay_s, argv]), file=self.process.stdin, flush=True)
        while not (line := self._answer()).startswith("["):
            assert line
        code, seconds = json.loads(line)
        return code, seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def random_kills(tmp_path: Path, kills: int, options: list[str]) -> None:
    """SIGKILL at random moments, from the first to the last of a run that saves at every step."""
    log = tmp_path / "log"
    starter = Starter(log, tmp_path / "cache")
    command = [str(tmp_path / "tiny.toml"), "--train.checkpoint_every", "1", *options]
    try:
        starter(None, *command, "--output.dir", str(tmp_path / "warm-up"))
        code, seconds = starter(None, *command, "--output.dir", str(tmp_path / "whole"))
        assert code == 0, log.read_text()
        whole = trained(tmp_path / "whole")
        draws, killed, number = random.Random(time.time_ns()), 0, 0
        while killed < kills:
            run = tmp_path / f"run-{number}"
            number += 1
            code = -9
            while code == -9:
                delay = draws.uniform(0, seconds) if killed < kills else None
                code, _ = starter(delay, *command, "--resume", str(run))
                killed += code == -9
                if run.exists():
                    assert_whole_files(run)
            assert code == 0, log.read_text()
            assert_same(trained(run), whole)
            assert not any(map(is_temporary, run.rglob("*")))
    finally:
        starter.close()
    assert "Traceback" not in log.read_text() and "damaged" not in log.read_text()


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(start, tmp_path):
    random_kills(tmp_path, 3, ["--train.steps", "8", "--sample.every", "3"])


@pytest.mark.slow
def test_mini_killed_at_25_random_moments_ends_in_the_same_bits(start, tmp_path):
    options = ["--model.base", "mini", "--train.steps", "8", "--sample.every", "3"]
    random_kills(tmp_path, 25, options)
