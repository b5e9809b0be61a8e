"""The tab "Train": what a run is to be like, and how those that were started get on.

What is shown of runs comes from the database and their events, once a second; nothing depends on
which page has started them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.families import built_in_version
from nora_diffusion.presets import PRESETS, auto_steps, find_preset
from nora_diffusion.schema import list_keys
from nora_diffusion.settings import quote
from webui.form import Field, Form, make_field, number, sections
from webui.jobs import JobView
from webui.messages import as_text, owner_of, reported
from webui.recipe import WITHHELD, bases, defaults, pictures_a_step
from webui.studio import Studio
from webui.subjects import SubjectView
from webui.tabs import Refresh
from webui.tabs.run_view import forecast_html, listed, loss_svg, sheet_html, status_html

WEIGHTS, STEPS = "model.base", "train.steps"
FIRST = (WEIGHTS, STEPS)
"""Settings that are shown at first sight, and not again among the advanced ones."""
FINISHED_SHOWN = 12
"""Runs that are over, in the list."""
LOG_LETTERS = 8_000
SHOW_STATUS = (
    "() => { document.getElementById('train-status').scrollIntoView({block: 'nearest'}); }"
)
NO_SUBJECT = (
    '<div class="run-empty"><strong>No subject yet.</strong>'
    "<p>Upload its photos in the tab Subject, then train here.</p></div>"
)

Values = Mapping[Component, Any]
Updates = dict[Component, Any]


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _TrainTab(studio).refresh


class _TrainTab:
    """The tab's components by name, and their handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._make_choices()
            with gr.Column(scale=6, min_width=320):
                self._make_view()
        self.basis = gr.State(("mini", ""))  # base and preset that the form shows
        self.suggested = gr.State(0)  # steps
        self.asked = gr.State(("", "", 0))  # forecast: key, problem, steps
        self.picked = gr.State("")  # run chosen in the list; "": the one at work
        self.seen = gr.State({})  # what the page shows already
        self.log_open = gr.State(False)
        self.chosen = {
            self.subject, self.base, self.preset, self.steps, *self.form.components,
            self.basis, self.suggested,
        }  # fmt: skip
        self._connect()

    def _make_choices(self) -> None:
        config = defaults("mini")
        self.empty = gr.HTML(NO_SUBJECT, elem_id="train-empty", visible=False)
        self.subject = gr.Dropdown([], label="Subject", elem_id="train-subject")
        self.base = gr.Dropdown(
            [(label, name) for name, label in bases().items()],
            value="mini", label="Base model", elem_id="train-base",
        )  # fmt: skip
        keys = {key.name: key for key in list_keys(type(config))}
        self.needs = gr.HTML(_needs("mini"), elem_id="train-needs")
        first = make_field(keys[WEIGHTS], config, "Weights", "train-weights")
        first.component.visible = False  # mini's are built in
        with gr.Row():
            self.preset = gr.Dropdown(
                [("none", ""), *((_card(name), name) for name in PRESETS)],
                value="", label="Memory preset", elem_id="train-preset", min_width=180,
            )  # fmt: skip
            self.steps = gr.Number(
                config.train.total_steps, label="Steps", elem_id="train-steps", min_width=140
            )
        self.explained = gr.HTML("", elem_id="train-explained", visible=False)
        self.forecast = gr.HTML("", elem_id="train-forecast", visible=False)
        self.start = gr.Button("Start training", variant="primary", elem_id="train-start")
        self.changed = gr.HTML("", elem_id="train-changed", visible=False)
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced"):
            rest = self._make_sections()
        self.form = Form([first, *rest])

    def _make_sections(self) -> list[Field]:
        config = defaults("mini")
        fields: list[Field] = []
        for name, about, keys in sections((*WITHHELD, *FIRST)):
            with gr.Accordion(f"{name}: {about}", open=False, elem_id=f"section-{name}"):
                fields += [make_field(key, config) for key in keys]
        return fields

    def _make_view(self) -> None:
        self.status = gr.HTML(status_html(None), elem_id="train-status", container=True)
        with gr.Row():
            self.stop = _button("Stop", "train-stop")
            self.resume = _button("Resume", "train-resume")
            self.up = _button("Move up", "train-up")
            self.down = _button("Move down", "train-down")
            self.cancel = _button("Cancel", "train-cancel")
        self.runs = gr.Radio([], label="Runs", elem_id="train-queue", visible=False)
        self.plot = gr.HTML("", elem_id="train-loss", visible=False)
        self.sheet = gr.HTML("", elem_id="train-sheet", visible=False)
        with gr.Accordion("Log", open=False, elem_id="train-log-panel") as self.log_panel:
            self.log = gr.Textbox(
                label="What the run prints", lines=12, max_lines=12, interactive=False,
                elem_id="train-log",
            )  # fmt: skip

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        watched = {self.subject, self.picked, self.seen, self.asked, self.log_open}
        view: list[Component] = [
            self.empty, self.subject, self.start, self.status, self.stop, self.resume, self.up,
            self.down, self.cancel, self.plot, self.sheet, self.runs, self.log, self.forecast,
            self.seen,
        ]  # fmt: skip
        settled = [self.steps, self.suggested, self.asked, self.explained, self.changed, self.needs]
        self.refresh = Refresh(self.on_open, [*view, *settled], frozenset(watched | self.chosen))
        gr.Timer(1.0).tick(self.on_tick, watched, view, queue=False, **quiet)

        def look(after: Any) -> None:
            after.then(self.on_tick, watched, view, **quiet)

        based = [*self.form.components, self.basis]
        for choice in (self.base, self.preset):
            choice.input(self.on_base, self.chosen, based, **quiet).then(
                self.on_settle, self.chosen, settled, **quiet
            )
        typed: list[Any] = [self.steps, *self.form.components]
        gr.on(
            [self.subject.change, *(component.input for component in typed)],
            self.on_settle, self.chosen, settled, trigger_mode="always_last", **quiet,
        )  # fmt: skip
        started = self.start.click(reported(self.on_start), self.chosen, self.picked, **quiet)
        look(started.success(None, js=SHOW_STATUS, **quiet))
        jobs = self.studio.jobs
        for button, act in (
            (self.stop, jobs.stop),
            (self.resume, jobs.resume),
            (self.cancel, jobs.cancel),
            (self.up, lambda owner, id: jobs.move(owner, id, -1)),
            (self.down, lambda owner, id: jobs.move(owner, id, 1)),
        ):
            look(button.click(_acting(act), self.runs, None, **quiet))
        look(self.runs.input(lambda id: id, self.runs, self.picked, **quiet))
        look(self.log_panel.expand(lambda: True, None, self.log_open, **quiet))
        look(self.log_panel.collapse(lambda: False, None, self.log_open, **quiet))

    # --- what is to be trained

    def on_base(self, values: Values) -> Updates:
        """Show the settings of the base and preset that were chosen.

        What somebody has typed stays when only the preset is another.
        """
        before, now = values[self.basis], (values[self.base], values[self.preset])
        old, new = defaults(before[0], before[1] or None), defaults(now[0], now[1] or None)
        shown = self.form.shown(new)
        kept = {
            field.component
            for field in self.form.fields
            if before[0] == now[0] and field.differs(values[field.component], old)
        }
        weights = self.form.components[0]
        updates: Updates = {c: value for c, value in shown.items() if c not in kept}
        if before[0] != now[0]:
            own = bool(built_in_version(new.model.base))
            updates[weights] = gr.Textbox(value=shown[weights], visible=not own)
        return updates | {self.basis: now}

    def on_settle(self, values: Values, request: gr.Request) -> Updates:
        """Suggest steps, tell what was changed, and begin with a forecast."""
        owner = owner_of(request)
        config, overrides = self._overrides(values)
        updates: Updates = {
            self.needs: _needs(values[self.base]),
            self.changed: _shown(_changes(overrides)),
        }
        subject = self._subject(owner, values[self.subject])
        if subject is None:
            return updates | {self.explained: _shown(_explain(values[self.preset], 0, 0))}
        batch = pictures_a_step(config.model_copy(update={"train": _train(config, overrides)}))
        steps = auto_steps(len(subject.photos), batch)
        explained = _explain(values[self.preset], len(subject.photos), steps)
        updates[self.explained] = _shown(explained)
        # Only a new suggestion, and where nobody has typed another: what is typed while this
        # answer is on its way must stay.
        before = values[self.suggested]
        if steps != before and before in (0, values[self.steps]):
            overrides[STEPS] = updates[self.steps] = steps
        updates[self.suggested] = steps
        try:
            settings = self.studio.jobs.settle(
                owner, subject.id, values[self.base], overrides, values[self.preset] or None
            )
            key = self.studio.forecasts.ask(owner, settings)
            updates[self.asked] = key, "", settings.train.total_steps
        except UserError as error:
            updates[self.asked] = "", str(error), 0
        return updates

    def on_start(self, values: Values, request: gr.Request) -> str:
        """Queue the run, and show it."""
        if not values[self.subject]:
            raise UserError("choose a subject first; new ones are made in the tab Subject")
        _, overrides = self._overrides(values)
        return self.studio.jobs.submit(
            owner_of(request),
            values[self.subject],
            values[self.base],
            overrides,
            values[self.preset] or None,
        )

    def _overrides(self, values: Values) -> tuple[DreamboothConfig, dict[str, Any]]:
        """The settings of base and preset, and what the form says otherwise."""
        config = defaults(values[self.base], values[self.preset] or None)
        overrides = self.form.overrides(values, config)
        steps = number(int).read(values[self.steps])
        if steps != config.train.steps:
            overrides[STEPS] = steps
        return config, overrides

    def _subject(self, owner: str, id: str | None) -> SubjectView | None:
        return next((one for one in self.studio.subjects.all(owner) if one.id == id), None)

    # --- how runs get on

    def on_open(self, values: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """Show everything; a forecast is made once somebody looks at the tab."""
        shown = self.on_tick(values, request)
        if isinstance(event.target, gr.Tab) and values[self.subject]:
            shown |= self.on_settle(values, request)
        return shown

    def on_tick(self, values: Values, request: gr.Request) -> Updates:
        """What has changed since this page was told last."""
        owner = owner_of(request)
        jobs = self.studio.jobs.all(owner)
        job = next((one for one in jobs if one.id == values[self.picked]), next(iter(jobs), None))
        key, problem, steps = values[self.asked]
        forecast = self.studio.forecasts.get(key)
        now: dict[str, tuple[Any, Callable[[], Updates]]] = {}

        def show(component: Component, sign: Any, make: Callable[[], Any]) -> None:
            now[str(component.elem_id)] = sign, lambda: {component: make()}

        subjects = self.studio.subjects.all(owner)
        names = [(one.name, one.id) for one in subjects]
        now["subjects"] = names, lambda: self._show_subjects(names, values)
        show(self.status, status_html(job), lambda: status_html(job))
        losses, total = (job.losses, job.steps) if job else ((), None)
        show(
            self.plot, (losses[-1:], total, job and job.id), lambda: _shown(loss_svg(losses, total))
        )
        show(self.sheet, (job and (job.id, job.sheet, job.state)), lambda: _shown(sheet_html(job)))
        show(
            self.forecast, (forecast, problem, steps),
            lambda: _shown(forecast_html(forecast, steps, problem)),
        )  # fmt: skip
        listing = [(text, id) for text, id in _listing(jobs)]
        show(
            self.runs, (listing, job and job.id),
            lambda: gr.Radio(choices=listing, value=job and job.id, visible=bool(listing)),
        )  # fmt: skip
        for button, fits in self._buttons(job):
            show(button, fits, lambda fits=fits: gr.Button(visible=fits))
        if job is not None and values[self.log_open]:
            log = self.studio.jobs.log(owner, job.id)[-LOG_LETTERS:]
            show(self.log, log, lambda: log)
        seen = values[self.seen]
        updates: Updates = {self.seen: seen | {name: sign for name, (sign, _) in now.items()}}
        for name, (sign, make) in now.items():
            if name not in seen or seen[name] != sign:
                updates |= make()
        return updates

    def _show_subjects(self, names: list[tuple[str, str]], values: Values) -> Updates:
        """The owner's subjects; one that is new is chosen."""
        ids = [id for _, id in names]
        known = {id for _, id in values[self.seen].get("subjects", ())}
        chosen = values[self.subject]
        if chosen not in ids or (known and ids[0] not in known):
            chosen = ids[0] if ids else None
        return {
            self.subject: gr.Dropdown(choices=names, value=chosen, visible=bool(ids)),
            self.empty: gr.HTML(visible=not ids),
            self.start: gr.Button(interactive=bool(ids)),
        }

    def _buttons(self, job: JobView | None) -> list[tuple[Component, bool]]:
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


def _shown(html: str) -> gr.HTML:
    """Text of an element that takes no room while it is empty."""
    return gr.HTML(html, visible=bool(html))


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


def _train(config: DreamboothConfig, overrides: Mapping[str, Any]) -> Any:
    """The section with those of the changed numbers that can be used."""
    names = ("batch_size", "gradient_accumulation_steps")
    given = {name: overrides.get(f"train.{name}") for name in names}
    usable = {name: value for name, value in given.items() if isinstance(value, int) and value > 0}
    return config.train.model_copy(update=usable)


def _card(preset: str) -> str:
    return f"{preset.removesuffix('gb')} GB GPU"


def _needs(base: str) -> str:
    """What a base model needs, in a sentence."""
    weights = defaults(base).model.base
    if built_in_version(weights):
        return "<p>Part of this program: nothing is downloaded, and any CPU will do.</p>"
    return (
        f"<p>Needs a GPU, and <code>{as_text(weights)}</code> from this machine or the Hugging "
        "Face hub, or other weights of its kind:</p>"
    )


def _explain(preset: str, photos: int, steps: int) -> str:
    """The preset's choices with their reasons, and where the steps are from."""
    text = ""
    if preset:
        rows = "".join(
            f"<li><code>{choice.key} = {as_text(quote(choice.value))}</code> {as_text(choice.why)}"
            "</li>"
            for choice in find_preset(preset)
        )
        text = f"<ul>{rows}</ul>"
    if photos:
        text += f"<p>Suggested for {photos} photo{'s' if photos > 1 else ''}: {steps} steps.</p>"
    return text


def _changes(overrides: Mapping[str, Any]) -> str:
    """What differs from the settings of base and preset."""
    shown = [
        f"<code>{key} = {as_text(quote(value))}</code>"
        for key, value in overrides.items()
        if key not in FIRST
    ]
    return f"<p>Changed: {', '.join(shown)}</p>" if shown else ""
