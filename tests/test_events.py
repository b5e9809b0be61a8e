"""events.jsonl: whole lines, whatever happens to the writer."""

import json
import math
import threading

import pytest

from nora_diffusion.events import Event, EventLog, read_events


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    log = EventLog(path)
    log.write("start", message="à la plage\nzwei")
    log.write("step", step=10, loss=0.5, lr=1e-3, eta_s=12.0)
    log.write("sample", step=10, image="samples/10.png")
    start, step, sample = read_events(path)
    assert (start["event"], start["message"], start["step"]) == ("start", "à la plage\nzwei", None)
    assert (step["step"], step["loss"], step["lr"], step["eta_s"]) == (10, 0.5, 1e-3, 12.0)
    assert sample["image"] == "samples/10.png"
    assert start["time"] <= step["time"] <= sample["time"]


def test_every_line_has_every_field_and_is_strict_json(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("error", step=3, loss=math.nan, lr=math.inf, message="diverged")
    (line,) = log.path.read_text().splitlines()

    def refuse(constant):
        raise ValueError(constant)

    event = json.loads(line, parse_constant=refuse)
    assert list(event) == list(Event.__annotations__)
    assert event["loss"] is None and event["lr"] is None


def test_unknown_events_are_refused_and_leave_no_trace(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(ValueError, match="event = 'finish': must be one of start, step"):
        log.write("finish")  # pyright: ignore[reportArgumentType]
    assert read_events(log.path) == []


def test_a_missing_file_holds_no_events(tmp_path):
    assert read_events(tmp_path / "none.jsonl") == []


def test_a_line_torn_at_any_byte_is_left_out_and_then_replaced(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("start")
    whole = path.stat().st_size
    log.write("step", step=1, message="é")
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        assert [event["event"] for event in read_events(path)] == ["start"]
        EventLog(path).write("step", step=2)
        assert [event["step"] for event in read_events(path)] == [None, 2]


def test_reopening_keeps_what_is_there(tmp_path):
    path = tmp_path / "events.jsonl"
    for step in range(3):
        EventLog(path).write("step", step=step)
    assert [event["step"] for event in read_events(path)] == [0, 1, 2]


@pytest.mark.parametrize("damage", [b"{broken", b"5", b"{}", b"\xff\x00"])
def test_damage_in_the_middle_is_named_and_left_out(tmp_path, damage):
    path = tmp_path / "events.jsonl"
    EventLog(path).write("start")
    path.write_bytes(damage + b"\n" + path.read_bytes())
    EventLog(path).write("done")
    with pytest.warns(UserWarning, match="events.jsonl, line 1: not an event"):
        assert [event["event"] for event in read_events(path)] == ["start", "done"]


def test_a_reader_beside_a_writer_sees_whole_events_only(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)

    def write():
        for step in range(300):
            log.write("step", step=step, message="x" * 200)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        steps = [event["step"] for event in read_events(path)]
        assert steps == list(range(len(steps)))
    writer.join()
    assert len(read_events(path)) == 300
