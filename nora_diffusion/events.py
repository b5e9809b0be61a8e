"""The progress of a run as lines of JSON: what command line, web UI and tests read."""

import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

from nora_diffusion.disk import naming

EventName = Literal["start", "step", "sample", "checkpoint", "done", "stopped", "error", "data"]


class Event(TypedDict):
    """One line of ``events.jsonl``; a field that does not apply is None.

    Attributes:
        time: seconds since 1970, UTC.
        step: optimiser steps completed.
        event: what happened.
        loss: mean loss since the last event; None where it is not finite.
        lr: learning rate of the step.
        eta_s: seconds to the end, estimated.
        image: path of a picture, relative to the run folder.
        message: a sentence for the reader.
    """

    time: float
    step: int | None
    event: EventName
    loss: float | None
    lr: float | None
    eta_s: float | None
    image: str | None
    message: str | None


FIELDS = Event.__annotations__.keys()


class EventLog:
    """Appends events to a file; a line cut short by a crash is dropped when it opens."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` for appending, creating it and its folder."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        _drop_torn_line(self.path)

    def write(
        self,
        event: EventName,
        step: int | None = None,
        loss: float | None = None,
        lr: float | None = None,
        eta_s: float | None = None,
        image: str | None = None,
        message: str | None = None,
    ) -> None:
        """Append one event; readers see the whole line or nothing.

        Raises:
            ValueError: when ``event`` is not an event name.
            OSError: when the file cannot be written, which is then as it was.
        """
        if event not in get_args(EventName):
            names = ", ".join(get_args(EventName))
            raise ValueError(f"event = {event!r}: must be one of {names}")
        line: Event = {
            "time": round(time.time(), 3),
            "step": step,
            "event": event,
            "loss": _finite(loss),
            "lr": _finite(lr),
            "eta_s": _finite(eta_s),
            "image": image,
            "message": message,
        }
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with naming(self.path), open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                written = file.write(data)
                if written != len(data):  # a disk that is nearly full takes a part
                    file.write(data[written:])
            except OSError:
                file.truncate(before)  # or the next event would be appended to half a line
                raise


def read_events(path: str | Path) -> list[Event]:
    """The events written so far; none where the file does not exist yet.

    A last line still being written, or cut short by a crash, is left out. So is any other line that
    is no event, with a warning.
    """
    return read_new_events(path, 0)[0]


def read_new_events(path: str | Path, start: int) -> tuple[list[Event], int]:
    """The events after byte ``start``, as ``read_events`` reads them, and where the next begin.

    Args:
        path: of the log; it may not exist yet.
        start: 0, or what an earlier call returned.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return [], start
    whole = data.rfind(b"\n") + 1  # after the last newline: a torn line
    events: list[Event] = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        event = _parse(line)
        if event is None:
            where = f"line {number}" + (f" after byte {start}" if start else "")
            warnings.warn(f"{path}, {where}: not an event: {line[:80]!r}", stacklevel=2)
        else:
            events.append(event)
    return events, start + whole


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return cast(Event, event) if isinstance(event, dict) and event.keys() >= FIELDS else None


def _finite(value: float | None) -> float | None:
    # NaN and Infinity are not JSON; the message of an error event says what happened.
    return value if value is not None and math.isfinite(value) else None


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())
