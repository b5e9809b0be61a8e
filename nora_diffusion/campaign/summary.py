"""What is known of each run of a campaign: a table to print, and ``summary.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nora_diffusion.campaign.subjects import ADAPTER, EVENTS, SUMMARY, SubjectRun
from nora_diffusion.disk import write_atomically
from nora_diffusion.events import read_events

COLUMNS: tuple[str, ...] = (
    "name", "subject", "class_name", "status", "steps", "last_loss", "seconds", "attempts",
    "adapter", "message",
)  # fmt: skip
Status = Literal["waiting", "done", "failed", "stopped"]


@dataclass
class Progress:
    """A run and what has become of it.

    Attributes:
        run: the run.
        status: waiting: for its turn or its end.
        attempts: processes started for it, in earlier campaigns too.
        seconds: that they took, together.
        message: what went wrong, or how it was stopped; empty otherwise.
        failures: attempts of this campaign that failed.
    """

    run: SubjectRun
    status: Status
    attempts: int = 0
    seconds: float = 0.0
    message: str = ""
    failures: int = 0

    def steps_and_loss(self) -> tuple[int | None, float | None]:
        """Finished steps and the last loss, from the run's events; None where there is none."""
        events = read_events(self.run.folder / EVENTS)
        steps = [event["step"] for event in events if event["step"] is not None]
        losses = [event["loss"] for event in events if event["event"] == "step"]
        return (steps[-1] if steps else None), (losses[-1] if losses else None)

    def row(self) -> dict[str, str]:
        """A text for each of ``COLUMNS``."""
        steps, loss = self.steps_and_loss()
        adapter = self.run.folder / ADAPTER
        return {
            "name": self.run.name,
            "subject": self.run.config.data.subject or "",
            "class_name": self.run.config.data.class_name or "",
            "status": self.status,
            "steps": "" if steps is None else str(steps),
            "last_loss": "" if loss is None else f"{loss:.4f}",
            "seconds": f"{self.seconds:.0f}",
            "attempts": str(self.attempts),
            "adapter": str(adapter) if self.status == "done" else "",
            "message": " ".join(self.message.split()),
        }


def start_summary(runs: Sequence[SubjectRun], out: Path) -> list[Progress]:
    """The runs as a campaign finds them; attempts and seconds are added to those of the file."""
    try:
        text = (out / SUMMARY).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    before = {row.get("name"): row for row in csv.DictReader(io.StringIO(text, newline=""))}
    found: list[Progress] = []
    for run in runs:
        earlier = before.get(run.name, {})
        found.append(
            Progress(
                run,
                "done" if run.done else "waiting",
                int(_number(earlier.get("attempts"))),
                _number(earlier.get("seconds")),
            )
        )
    return found


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # somebody has edited the file
        return 0.0


def write_summary(table: Sequence[Progress], out: Path) -> Path:
    """Write ``summary.csv``, atomically; returns its path."""
    path = out / SUMMARY
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(one.row() for one in table)
    write_atomically(path, text.getvalue().encode())
    return path


def show_table(table: Sequence[Progress], out: Path) -> str:
    """The table for a terminal: what went wrong, or the adapter's place in ``out``, at the end."""
    columns = ("name", "status", "steps", "last_loss", "seconds", "attempts")
    lines = [[*columns, "adapter or message"]]
    for one in table:
        row = one.row()
        adapter = one.run.folder.relative_to(out) / ADAPTER
        last = str(adapter) if one.status == "done" else row["message"]
        lines.append([*(row[column] or "-" for column in columns), last])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    shown = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line[:-1], widths, strict=True))
        ]
        shown.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join(shown)
