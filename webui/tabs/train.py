"""The tab "Train": what a run is to be like, and how those that were started get on."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from webui.messages import owner_of, reported
from webui.studio import Studio
from webui.tabs import Refresh, Updates, Values
from webui.tabs.changes import unseen
from webui.tabs.train_form import TrainForm
from webui.tabs.train_runs import TrainRuns

SHOW_STATUS = (
    "() => { document.getElementById('train-status').scrollIntoView({block: 'nearest'}); }"
)


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _TrainTab(studio).refresh


class _TrainTab:
    """The form and the runs, both shown anew once a second where something has changed."""

    def __init__(self, studio: Studio) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.form = TrainForm(studio)
            with gr.Column(scale=6, min_width=320):
                self.runs = TrainRuns(studio.jobs)
        self.seen = gr.State({})  # what the page shows already
        self._connect()

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        form, runs = self.form, self.runs
        watched = {form.subject, form.asked, runs.picked, runs.log_open, self.seen}
        view: list[Component] = [*form.shown, *runs.shown, self.seen]
        self.refresh = Refresh(
            self.on_open, [*view, *form.settled], frozenset(watched | form.chosen)
        )
        gr.Timer(1.0).tick(self.on_tick, watched, view, queue=False, **quiet)

        def look(after: Any) -> None:
            after.then(self.on_tick, watched, view, **quiet)

        form.connect(quiet)
        runs.connect(look, quiet)
        started = form.start.click(reported(form.on_start), form.chosen, runs.picked, **quiet)
        look(started.success(None, js=SHOW_STATUS, **quiet))

    def on_open(self, values: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """Show everything; a forecast is made once somebody looks at the tab."""
        shown = self.on_tick(values, request)
        if isinstance(event.target, gr.Tab) and values[self.form.subject]:
            shown |= self.form.on_settle(values, request)
        return shown

    def on_tick(self, values: Values, request: gr.Request) -> Updates:
        """What has changed since this page was told last."""
        owner, seen = owner_of(request), values[self.seen]
        parts = [*self.form.parts(owner, values, seen), *self.runs.parts(owner, values)]
        updates, now_seen = unseen(parts, seen)
        return updates | {self.seen: now_seen}
