"""The form of the tab "Train": what a run is to be like, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.families import built_in_version
from nora_diffusion.presets import PRESETS, auto_steps
from nora_diffusion.schema import list_keys
from webui.bases import base_choices, defaults
from webui.form import Field, Form, make_field, number, sections
from webui.messages import owner_of
from webui.recipe import WITHHELD, pictures_a_step
from webui.studio import Studio
from webui.subjects import SubjectView
from webui.tabs import Updates, Values
from webui.tabs.changes import Part, part_of
from webui.tabs.pieces import optional
from webui.tabs.run_view import forecast_html
from webui.tabs.train_view import (
    NO_SUBJECT,
    changes_html,
    needs_html,
    preset_html,
    preset_label,
    steps_html,
)

WEIGHTS, STEPS = "model.base", "train.steps"
FIRST = (WEIGHTS, STEPS)
"""Settings that are shown at first sight, and not again among the advanced ones."""


class TrainForm:
    """The form's components by name, and their handlers.

    ``chosen`` are those that hold what a person chose, ``shown`` those that ``parts`` changes,
    ``settled`` those that ``on_settle`` changes.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._make_choices()
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced"):
            rest = self._make_sections()
        self.settings = Form([self.weights, *rest])
        self.basis = gr.State(("mini", ""))  # base and preset that the form shows
        self.typed = gr.State(False)  # whether the steps are a person's own
        self.asked = gr.State(("", "", 0))  # forecast: key, problem, steps
        self.chosen = {
            self.subject, self.base, self.preset, self.steps, *self.settings.components,
            self.basis, self.typed,
        }  # fmt: skip
        self.shown: list[Component] = [self.empty, self.subject, self.start, self.forecast]
        self.settled = [self.asked, self.explained, self.changed, self.needs]

    # --- components

    def _make_choices(self) -> None:
        config = defaults("mini")
        self.empty = gr.HTML(NO_SUBJECT, elem_id="train-empty", visible=False)
        self.subject = gr.Dropdown([], label="Subject", elem_id="train-subject")
        self.base = gr.Dropdown(
            base_choices(), value="mini", label="Base model", elem_id="train-base"
        )
        keys = {key.name: key for key in list_keys(type(config))}
        self.needs = gr.HTML(needs_html("mini"), elem_id="train-needs")
        self.weights = make_field(keys[WEIGHTS], config, "Weights", "train-weights")
        self.weights.component.visible = False  # mini's are built in
        with gr.Row():
            self.preset = gr.Dropdown(
                [("none", ""), *((preset_label(name), name) for name in PRESETS)],
                value="", label="Memory preset", elem_id="train-preset", min_width=180,
            )  # fmt: skip
            self.steps = gr.Number(
                config.train.total_steps, label="Steps", elem_id="train-steps", min_width=140
            )
        self.explained = gr.HTML("", elem_id="train-explained", visible=False)
        self.forecast = gr.HTML("", elem_id="train-forecast", visible=False)
        self.start = gr.Button("Start training", variant="primary", elem_id="train-start")
        self.changed = gr.HTML("", elem_id="train-changed", visible=False)

    def _make_sections(self) -> list[Field]:
        config = defaults("mini")
        fields: list[Field] = []
        for name, about, keys in sections((*WITHHELD, *FIRST)):
            with gr.Accordion(f"{name}: {about}", open=False, elem_id=f"section-{name}"):
                fields += [make_field(key, config) for key in keys]
        return fields

    def connect(self, quiet: Mapping[str, Any]) -> None:
        """Connect what concerns the form alone; ``quiet``: keywords of its events."""
        based = [*self.settings.components, self.steps, self.basis]
        for choice in (self.base, self.preset):
            choice.input(self.on_base, self.chosen, based, **quiet).then(
                self.on_settle, self.chosen, self.settled, **quiet
            )
        self.steps.input(self.on_steps, self.steps, self.typed, **quiet)
        typed: list[Any] = [self.steps, *self.settings.components]
        gr.on(
            [self.subject.change, *(component.input for component in typed)],
            self.on_settle, self.chosen, self.settled, trigger_mode="always_last", **quiet,
        )  # fmt: skip

    # --- handlers

    def on_steps(self, given: float | None) -> bool:
        """Steps that somebody types are theirs; an emptied field is filled by the next base."""
        return bool(given)

    def on_base(self, values: Values) -> Updates:
        """Show the settings of the base and preset that were chosen.

        What somebody has typed stays when only the preset is another; their own steps stay always.
        A list of Gradio's tells each choice twice, with the same values but for the states: what is
        typed after the first answer must stay as well.
        """
        before, now = values[self.basis], (values[self.base], values[self.preset])
        old, new = defaults(before[0], before[1] or None), defaults(now[0], now[1] or None)
        shown = self.settings.shown(new)
        kept = {
            field.component
            for field in self.settings.fields
            if before[0] == now[0] and field.differs(values[field.component], old)
        }
        weights = self.weights.component
        updates: Updates = {c: value for c, value in shown.items() if c not in kept}
        if before[0] != now[0]:
            own = bool(built_in_version(new.model.base))
            updates[weights] = gr.Textbox(value=shown[weights], visible=not own)
            # That steps were typed may be told later than this; another number tells it as well.
            if not values[self.typed] and values[self.steps] in (None, 0, old.train.total_steps):
                updates[self.steps] = new.train.total_steps
        return updates | {self.basis: now}

    def on_settle(self, values: Values, request: gr.Request) -> Updates:
        """Tell where the steps are from and what was changed, and begin with a forecast."""
        owner = owner_of(request)
        config, overrides = self._overrides(values)
        advanced = {key: value for key, value in overrides.items() if key not in FIRST}
        updates: Updates = {
            self.needs: needs_html(values[self.base]),
            self.changed: optional(changes_html(advanced)),
        }
        explained = preset_html(values[self.preset])
        subject = self._subject(owner, values[self.subject])
        if subject is None:
            return updates | {self.explained: optional(explained)}
        photos = len(subject.photos)
        by_photos = auto_steps(photos, pictures_a_step(_with_batch(config, overrides)))
        explained += steps_html(config.train.total_steps, photos, by_photos)
        updates[self.explained] = optional(explained)
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
        """Queue the run, and return its id."""
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
        overrides = self.settings.overrides(values, config)
        steps = number(int).read(values[self.steps])
        if steps != config.train.steps:
            overrides[STEPS] = steps
        return config, overrides

    def _subject(self, owner: str, id: str | None) -> SubjectView | None:
        return next((one for one in self.studio.subjects.all(owner) if one.id == id), None)

    # --- what changes by itself

    def parts(self, owner: str, values: Values, seen: Mapping[str, Any]) -> list[Part]:
        """The owner's subjects, and the forecast; ``seen``: what the page shows already."""
        names = [(one.name, one.id) for one in self.studio.subjects.all(owner)]
        known = {id for _, id in seen.get("subjects", ())}
        key, problem, steps = values[self.asked]
        forecast = self.studio.forecasts.get(key)
        return [
            Part("subjects", names, lambda: self._offer(names, known, values[self.subject])),
            part_of(
                self.forecast, (forecast, problem, steps),
                lambda: optional(forecast_html(forecast, steps, problem)),
            ),
        ]  # fmt: skip

    def _offer(self, names: list[tuple[str, str]], known: set[str], chosen: str | None) -> Updates:
        """The subjects to choose from; one that is new is chosen."""
        ids = [id for _, id in names]
        if chosen not in ids or (known and ids[0] not in known):
            chosen = ids[0] if ids else None
        return {
            self.subject: gr.Dropdown(choices=names, value=chosen, visible=bool(ids)),
            self.empty: gr.HTML(visible=not ids),
            self.start: gr.Button(interactive=bool(ids)),
        }


def _with_batch(config: DreamboothConfig, overrides: Mapping[str, Any]) -> DreamboothConfig:
    """The settings with the batch as it was changed, where that can be used."""
    names = ("batch_size", "gradient_accumulation_steps")
    given = {name: overrides.get(f"train.{name}") for name in names}
    usable = {name: value for name, value in given.items() if isinstance(value, int) and value > 0}
    return config.model_copy(update={"train": config.train.model_copy(update=usable)})
