"""TensorBoard and W&B get what ``events.jsonl`` gets, and take nothing from training."""

import os
import re
import sys
import time

import pytest
from accelerate import PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nora_diffusion.config import UserError, load_run
from nora_diffusion.events import read_events
from nora_diffusion.train import dreambooth
from nora_diffusion.train.report import Report
from nora_diffusion.train.trackers import open_trackers
from tests.train.test_dreambooth import assert_same, trained


@pytest.fixture
def wandb_offline(monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    PartialState._reset_state()  # as in a process that has just begun


def records(path) -> list:
    """All records of one of W&B's files so far."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def logged_to_wandb(folder) -> list[dict[str, str]]:
    """Every history row in W&B's own files, values as JSON.

    Its service closes a file a moment after the run has finished, with a record of the exit.
    """
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 30
        while "exit" not in {r.WhichOneof("record_type") for r in records(path)}:
            assert time.monotonic() < deadline, f"{path} was never finished"
            time.sleep(0.05)
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or ".".join(i.nested_key): i.value_json for i in items})
    return rows


def test_all_get_the_same_numbers_and_a_resumed_run_stays_one(
    make_config, tmp_path, wandb_offline, capfd
):
    train = {"steps": 2, "batch_size": 1, "log_every": 1}
    plain = dreambooth.run(make_config(train=train, output={"dir": str(tmp_path / "plain")}))
    output = {"dir": str(tmp_path / "run"), "tensorboard": True, "wandb": "my-project"}
    run = dreambooth.run(make_config(train=train, output=output))
    assert_same(trained(run), trained(plain))

    def steps() -> list:
        return [e for e in read_events(run / "events.jsonl") if e["event"] == "step"]

    def check() -> None:
        rows = [row for row in logged_to_wandb(run) if "loss" in row]
        assert [float(row["loss"]) for row in rows] == [event["loss"] for event in steps()]
        assert [float(row["lr"]) for row in rows] == [event["lr"] for event in steps()]
        board = EventAccumulator(str(run / "tensorboard"))
        board.Reload()
        scalars = [scalar.value for scalar in board.Scalars("loss")]
        assert scalars == pytest.approx([event["loss"] for event in steps()])

    assert len(steps()) == 2
    check()
    logged = {key for row in logged_to_wandb(run) for key in row}
    assert {"samples.filenames", "before and after.filenames"} <= logged
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert {tag.split("/")[0] for tag in board.Tags()["images"]} == {"samples", "before and after"}

    identity = (run / "wandb" / "run-id.txt").read_text()
    dreambooth.run(load_run(run, ["train.steps=3"]), resume=True)
    assert (run / "wandb" / "run-id.txt").read_text() == identity
    assert len(steps()) == 3
    check()
    logs = [path.name for path in run.glob("wandb/offline-run-*")]
    assert len(logs) == 2 and all(name.endswith(f"-{identity}") for name in logs)


def test_wandb_alone_gets_the_settings_numbers_and_pictures(make_config, tmp_path, wandb_offline):
    cfg = make_config(output={"wandb": "my-project"})
    (tracker,) = open_trackers(cfg, tmp_path)
    with Report(tmp_path, total_steps=2, log_every=1, trackers=[tracker]) as report:
        report.step(1, 0.5, 1e-3)
        report.picture(1, tmp_path / "a.png", Image.new("RGB", (8, 8)), "samples")
        report.step(2, 0.25, 1e-3)
    assert tracker.run.config["train.optimizer"] == "adamw"
    rows = logged_to_wandb(tmp_path)
    assert [row["loss"] for row in rows] == ["0.5", "0.25"]
    assert "samples.filenames" in rows[0]


@pytest.mark.parametrize(
    ("output", "library"),
    [({"wandb": "my-project"}, "wandb"), ({"tensorboard": True}, "tensorboard")],
)
def test_a_missing_tracker_is_told_before_anything_is_written(
    output, library, make_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)
    cfg = make_config(output={"dir": str(tmp_path / "run"), **output})
    cure = re.escape(f'pip install "nora-diffusion[{library}]"')
    with pytest.raises(UserError, match=f"output.{library} = .*{cure}"):
        dreambooth.run(cfg)
    assert not (tmp_path / "run").exists()
