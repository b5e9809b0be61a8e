"""Checkpoints: whole or absent, newest first, and damage is noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nora_diffusion.train.checkpoint import newest_checkpoint, newest_path, save_checkpoint

ROOT = Path(__file__).parents[2]


def save(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {
        "trained": {"a": torch.full((50,), float(step))},
        "optimizer": {"a/step": torch.tensor(float(step)), "a/exp_avg": torch.ones(2, 3).T},
    }
    return save_checkpoint(run, step, {"note": f"step {step}"}, tensors, keep)


def test_what_is_read_is_what_was_saved(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-7"
    assert not list(path.glob("adapter*"))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["note"]) == (7, "step 7")
    assert checkpoint.tensors.keys() == {"trained", "optimizer"}
    assert torch.equal(checkpoint.tensors["trained"]["a"], torch.full((50,), 7.0))
    assert checkpoint.tensors["optimizer"]["a/exp_avg"].shape == (3, 2)


def test_the_newest_by_number_is_taken_and_old_ones_are_removed(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_path(tmp_path) is None
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-10", "step-11"]
    assert newest_path(tmp_path) == tmp_path / "checkpoints" / "step-11"


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        data[len(data) // 2] ^= 0x80
        path.write_bytes(data)
    with pytest.warns(UserWarning, match="step-2 is damaged"):
        checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_state_that_is_another_is_noticed(tmp_path):
    """Such as one digit: it still is JSON."""
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "state.json"
    path.write_text(path.read_text().replace('"note": "step 2"', '"note": "step 3"'))
    with pytest.warns(UserWarning, match=r"step-2 is damaged \(state.json is not what was"):
        checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_newer_version_is_not_guessed_at(tmp_path):
    path = save(tmp_path, 3) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.warns(UserWarning, match="version is 3"):
        assert newest_checkpoint(tmp_path) is None


_WRITER = """
import itertools, sys
from pathlib import Path
import torch
from nora_diffusion.train.checkpoint import save_checkpoint
for step in itertools.count(1):
    tensors = {"trained": {"a": torch.full((200_000,), float(step))}}
    save_checkpoint(Path(sys.argv[1]), step, {}, tensors, keep=2)
"""


def kill_while_writing(run: Path, delay_s: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(run)], cwd=ROOT)
    # Any step: a fast writer has pruned the first before a busy machine looks.
    while newest_path(run) is None:
        assert writer.poll() is None
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL


def assert_whole(run: Path) -> None:
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert folders
    checkpoint = newest_checkpoint(run)  # a damaged one would warn, and warnings fail this test
    assert checkpoint is not None
    assert checkpoint.step == max(int(path.name.removeprefix("step-")) for path in folders)
    values = checkpoint.tensors["trained"]["a"]
    assert torch.equal(values, torch.full((200_000,), float(checkpoint.step)))


@pytest.mark.filterwarnings("error")
def test_a_kill_while_writing_leaves_whole_checkpoints(tmp_path):
    kill_while_writing(tmp_path, 0.2)
    assert_whole(tmp_path)
    save(tmp_path, 10**6)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not any(name.startswith(".partial") for name in left) and len(left) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_many_kills_while_writing_leave_whole_checkpoints(tmp_path):
    for number in range(15):
        run = tmp_path / str(number)
        kill_while_writing(run, 0.05 + 0.013 * number)
        assert_whole(run)
