"""The runs in the tab "Train": how those that were started get on, and what can be done with them.

What is shown comes from the database and the runs' events; nothing depends on which page has
started them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from webui.jobs import Jobs, JobView
from webui.messages import owner_of, reported
from webui.tabs import Values
from webui.tabs.changes import Part, part_of
from webui.tabs.pieces import optional
from webui.tabs.run_view import listed, loss_svg, sheet_html, status_html

FINISHED_SHOWN = 12
"""Runs that are over, in the list."""
LOG_LETTERS = 8_000


class TrainRuns:
    """The components of the runs by name; ``shown`` are those that ``parts`` changes."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.status = gr.HTML(status_html(None), elem_id="train-status", container=True)
        with gr.Row():
            self.stop = _button("Stop", "train-stop")
            self.resume = _button("Resume", "train-resume")
            self.up = _button("Move up", "train-up")
            self.down = _button("Move down", "train-down")
            self.cancel = _button("Cancel", "train-cancel")
        self.listed = gr.Radio([], label="Runs", elem_id="train-queue", visible=False)
        self.plot = gr.HTML("", elem_id="train-loss", visible=False)
        self.sheet = gr.HTML("", elem_id="train-sheet", visible=False)
        with gr.Accordion("Log", open=False, elem_id="train-log-panel") as self.log_panel:
            self.log = gr.Textbox(
                label="What the run prints", lines=12, max_lines=12, interactive=False,
                elem_id="train-log",
            )  # fmt: skip
        self.picked = gr.State("")  # run chosen in the list; "": the one at work
        self.log_open = gr.State(False)
        self.shown: list[Component] = [
            self.status, self.stop, self.resume, self.up, self.down, self.cancel, self.plot,
            self.sheet, self.listed, self.log,
        ]  # fmt: skip

    def connect(self, look: Callable[[Any], None], quiet: Mapping[str, Any]) -> None:
        """Connect the buttons and the list.

        Args:
            look: shows what an event has changed.
            quiet: keywords of the events.
        """
        for button, act in (
            (self.stop, self.jobs.stop),
            (self.resume, self.jobs.resume),
            (self.cancel, self.jobs.cancel),
            (self.up, lambda owner, id: self.jobs.move(owner, id, -1)),
            (self.down, lambda owner, id: self.jobs.move(owner, id, 1)),
        ):
            look(button.click(_acting(act), self.listed, None, **quiet))
        look(self.listed.input(lambda id: id, self.listed, self.picked, **quiet))
        look(self.log_panel.expand(lambda: True, None, self.log_open, **quiet))
        look(self.log_panel.collapse(lambda: False, None, self.log_open, **quiet))

    def parts(self, owner: str, values: Values) -> list[Part]:
        """The list of runs, and the one that was picked or is at work."""
        jobs = self.jobs.all(owner)
        job = next((one for one in jobs if one.id == values[self.picked]), next(iter(jobs), None))
        losses, total = (job.losses, job.steps) if job else ((), None)
        listing = _listing(jobs)
        parts = [
            part_of(self.status, status_html(job), lambda: status_html(job)),
            part_of(
                self.plot, (losses[-1:], total, job and job.id),
                lambda: optional(loss_svg(losses, total)),
            ),
            part_of(
                self.sheet, job and (job.id, job.sheet, job.state),
                lambda: optional(sheet_html(job)),
            ),
            part_of(
                self.listed, (listing, job and job.id),
                lambda: gr.Radio(choices=listing, value=job and job.id, visible=bool(listing)),
            ),
        ]  # fmt: skip
        for button, fits in self._buttons(job):
            parts.append(part_of(button, fits, lambda fits=fits: gr.Button(visible=fits)))
        if job is not None and values[self.log_open]:
            log = self.jobs.log(owner, job.id)[-LOG_LETTERS:]
            parts.append(part_of(self.log, log, lambda: log))
        return parts

    def _buttons(self, job: JobView | None) -> list[tuple[Component, bool]]:
        """Each button, and whether it can be used on a run."""
        state = job.state if job else ""
        queued = state == "queued"
        return [
            (self.stop, state == "running"),
            (self.resume, bool(job and job.resumable)),
            (self.up, queued),
            (self.down, queued),
            (self.cancel, queued),
        ]


def _acting(act: Callable[[str, str], object]) -> Callable[..., None]:
    """A handler that does something with the run chosen in the list."""

    @reported
    def handler(id: str | None, request: gr.Request) -> None:
        act(owner_of(request), id or "")

    return handler


def _button(text: str, elem_id: str) -> gr.Button:
    return gr.Button(text, elem_id=elem_id, visible=False, size="sm", min_width=90)


def _listing(jobs: list[JobView]) -> list[tuple[str, str]]:
    """Lines for the runs that are not over, and for the newest of the others."""
    lines: list[tuple[str, str]] = []
    place = over = 0
    for job in jobs:
        place += job.state == "queued"
        over += job.state not in ("queued", "running", "stopping")
        if over <= FINISHED_SHOWN:
            lines.append((listed(job, place if job.state == "queued" else 0), job.id))
    return lines
