"""The tab "Create": pictures from prompts, with one to four adapters, and the gallery."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from nora_diffusion.config import UserError
from webui.api import SAMPLING
from webui.library import AdapterView
from webui.messages import as_text, owner_of, reported
from webui.pictures import PictureSettings, read_settings
from webui.recipe import bases, defaults
from webui.sampler import ADAPTERS_AT_MOST, SIDE_AT_MOST_PX, Request, Weighted
from webui.studio import Studio
from webui.tabs import Refresh
from webui.tabs.create_view import (
    COMPARED,
    NO_ADAPTER,
    SWEPT,
    base_label,
    caption,
    config_of,
    example,
    problem_html,
    safety_html,
    settings_text,
    sheet_caption,
    told_html,
)
from webui.tabs.pieces import picture

SHOWN_AT_ONCE = 30
SHOW_RESULTS = (
    "() => { document.getElementById('create-results').scrollIntoView({block: 'nearest'}); }"
)

Values = Mapping[Component, Any]
Updates = dict[Block, Any]


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _CreateTab(studio).refresh


class _CreateTab:
    """The tab's components by name, and their handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._make_form()
            with gr.Column(scale=6, min_width=320):
                self._make_results()
        self._make_gallery()
        self.order = gr.State([])  # ids of the adapters whose strengths the sliders are, in order
        self.basis = gr.State("mini")  # base whose defaults steps and guidance were set to
        self.shown = gr.State([])  # ids of the gallery's pictures
        self.limit = gr.State(SHOWN_AT_ONCE)
        self.picked = gr.State("")  # id of the picture whose settings are shown
        self.form = {
            self.adapters, self.base, self.prompt, self.negative, self.count, self.seed,
            self.steps, self.guidance, self.width, self.height, *self.strengths, self.order,
            self.basis,
        }  # fmt: skip
        self.gallery_parts = [self.gallery, self.shown, self.more]
        self._connect()

    # --- components

    def _make_form(self) -> None:
        sample = defaults("mini").sample
        self.empty = gr.HTML(NO_ADAPTER, elem_id="create-empty", visible=False)
        self.adapters = gr.Dropdown(
            [], value=[], multiselect=True, max_choices=ADAPTERS_AT_MOST, label="Adapters",
            info=f"Up to {ADAPTERS_AT_MOST} are blended; none: the base model alone.",
            elem_id="create-adapters",
        )  # fmt: skip
        self.strengths = [
            gr.Slider(
                -2, 2, 1, step=0.05, label="Strength", visible=False,
                elem_id=f"create-strength-{index + 1}",
            )
            for index in range(ADAPTERS_AT_MOST)
        ]  # fmt: skip
        self.base = gr.Dropdown(
            [(label, name) for name, label in bases().items()],
            value="mini", label="Base model", elem_id="create-base",
        )  # fmt: skip
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, max_length=4000, elem_id="create-prompt",
            placeholder=example(None),
        )  # fmt: skip
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, max_length=4000, elem_id="create-negative",
            placeholder="what the pictures should not show",
        )  # fmt: skip
        self.count = gr.Slider(1, 16, 4, step=1, label="Pictures", elem_id="create-count")
        with gr.Row(equal_height=True, elem_classes="create-seed-row"):
            self.seed = gr.Number(
                0, precision=0, label="Seed of the first picture", elem_id="create-seed",
                min_width=140, scale=3,
            )  # fmt: skip
            self.dice = gr.Button("New seed", elem_id="create-dice", min_width=100, scale=1)
        with gr.Accordion("Steps, guidance, size", open=False, elem_id="create-more"):
            self.steps = gr.Slider(1, 150, sample.steps, step=1, label="Steps",
                                   elem_id="create-steps")  # fmt: skip
            self.guidance = gr.Slider(
                0, 20, sample.guidance, step=0.1, label="Guidance (1: off)",
                elem_id="create-guidance",
            )  # fmt: skip
            with gr.Row():
                self.width = _side("Width in px (0: the base's own)", "create-width")
                self.height = _side("Height in px (0: the base's own)", "create-height")
        self.generate = gr.Button("Generate", variant="primary", elem_id="create-generate")
        with gr.Row():
            self.compare = gr.Button(
                "Compare with base", elem_id="create-compare", interactive=False, min_width=140
            )
            self.sweep = gr.Button(
                "Strength sweep", elem_id="create-sweep", interactive=False, min_width=140
            )
        self.stop = gr.Button("Stop", variant="stop", elem_id="create-stop", visible=False)

    def _make_results(self) -> None:
        self.results = gr.Gallery(
            label="Results", columns=2, object_fit="contain", height="auto", type="filepath",
            interactive=False, elem_id="create-results", buttons=["download", "fullscreen"],
        )  # fmt: skip
        self.told = gr.HTML(safety_html("mini"), elem_id="create-told")

    def _make_gallery(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self.gallery = gr.Gallery(
                    label="All your pictures, newest first", columns=5, object_fit="contain",
                    height="auto", type="filepath", interactive=False, allow_preview=False,
                    elem_id="create-gallery",
                )  # fmt: skip
                self.more = gr.Button("Show older pictures", size="sm", visible=False)
            with gr.Column(scale=5, min_width=320):
                self.preview = gr.HTML("", visible=False, elem_id="create-preview")
                self.settings = gr.Textbox(
                    label="Settings", lines=9, max_lines=20, interactive=False,
                    elem_id="create-settings",
                    placeholder="Choose a picture of the gallery to see how it was made.",
                )  # fmt: skip
                with gr.Row(visible=False) as self.actions:
                    self.use = gr.Button("Use these settings", elem_id="create-use", min_width=140)
                    self.delete = gr.Button(
                        "Delete for good", variant="stop", elem_id="create-delete", min_width=140
                    )
                self.restore = gr.File(
                    label="Drop a picture made here to get its settings back",
                    file_types=[".png"], height=150, elem_id="create-restore",
                )  # fmt: skip

    # --- events

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        adapter_parts = [
            self.base, self.prompt, self.compare, self.sweep, self.told, self.order,
            self.basis, self.steps, self.guidance, *self.strengths,
        ]  # fmt: skip
        for event in (self.adapters.input, self.base.input):
            event(reported(self._on_choice), self.form, adapter_parts, **quiet)
        self.dice.click(lambda: random.randrange(2**31), None, self.seed, **quiet)
        self.prompt.focus(self.studio.sampler.prepare, None, None, **quiet)
        buttons: dict[Callable[..., Any], tuple[float, ...]] = {
            self.generate.click: (1.0,),
            self.prompt.submit: (1.0,),
            self.compare.click: COMPARED,
            self.sweep.click: SWEPT,
        }
        for event, strengths in buttons.items():
            self._connect_drawing(event, strengths, quiet)
        self.stop.click(reported(self._on_stop), None, None, **quiet)
        self.more.click(self._on_more, {self.limit}, [self.limit, *self.gallery_parts], **quiet)
        picked = [self.preview, self.settings, self.actions, self.picked]
        self.gallery.select(reported(self._on_pick), {self.shown}, picked, **quiet)
        restored = [*self.form, self.empty, self.compare, self.sweep, self.told, self.restore]
        self.use.click(reported(self._on_use), {self.picked}, restored, **quiet)
        self.delete.click(
            reported(self._on_delete), {self.picked, self.limit},
            [*picked, *self.gallery_parts], **quiet,
        )  # fmt: skip
        self.restore.upload(reported(self._on_drop), {self.restore}, restored, **quiet)
        self.refresh = Refresh(
            self._on_refresh,
            [*self.form, self.empty, self.compare, self.sweep, self.told, *self.gallery_parts],
            frozenset({*self.form, self.limit}),
        )

    def _connect_drawing(
        self, event: Callable[..., Any], strengths: tuple[float, ...], quiet: dict[str, Any]
    ) -> None:
        shown = event(lambda: gr.update(visible=True), None, self.stop, js=SHOW_RESULTS, **quiet)

        def draw(
            values: Values,
            request: gr.Request,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> Updates:
            try:
                return self._draw(values, strengths, owner_of(request), progress)
            except UserError as error:
                # Not raised: Gradio would lay the word "Error" over the pictures that are there.
                return {self.told: problem_html(str(error)), self.stop: gr.update(visible=False)}

        drawn = shown.then(
            draw, {*self.form, self.limit},
            [self.results, self.told, self.stop, *self.gallery_parts],
            api_visibility="private", show_progress_on=self.results,
            concurrency_id=SAMPLING, concurrency_limit=1,
        )  # fmt: skip
        drawn.failure(lambda: gr.update(visible=False), None, self.stop, **quiet)

    # --- handlers

    def _draw(
        self, values: Values, strengths: tuple[float, ...], owner: str, progress: gr.Progress
    ) -> Updates:
        request = dataclasses.replace(self._request(values, owner), strengths=strengths)
        drawn = self.studio.sampler.draw(
            request, lambda done, text: progress(done, desc=text), owner
        )
        for path, settings in zip(drawn.files, drawn.settings, strict=True):
            self.studio.pictures.add(owner, path, settings)
        if drawn.sheet is not None:
            self.studio.pictures.add(owner, drawn.sheet, drawn.sheet_settings)
        shown = list(zip(map(str, drawn.files), map(caption, drawn.settings), strict=True))
        if drawn.sheet is not None:  # its pictures are in the gallery
            shown = [(str(drawn.sheet), sheet_caption(strengths))]
        columns = 1 if len(shown) == 1 else 2
        return {
            self.results: gr.update(value=shown, columns=columns, selected_index=None),
            self.told: told_html(drawn),
            self.stop: gr.update(visible=False),
            **self._gallery(owner, values[self.limit]),
        }

    def _request(self, values: Values, owner: str) -> Request:
        prompt = (values[self.prompt] or "").strip()
        if not prompt:
            raise UserError(f"prompt: write what to draw, such as “{example(None)}”")
        chosen = [self.studio.library.get(owner, id) for id in values[self.adapters] or []]
        self._check_one_base(chosen)
        weights = self._weights(values)
        adapters = tuple(
            Weighted(one.path, weights.get(one.id, 1.0), one.id, one.name) for one in chosen
        )
        base = chosen[0].base if chosen else values[self.base]
        if not chosen and base not in bases():
            raise UserError("base model: choose one of the list")
        return Request(
            base=base,
            prompt=prompt,
            adapters=adapters,
            negative_prompt=(values[self.negative] or "").strip(),
            n=int(values[self.count]),
            seed=_whole(values[self.seed], "seed"),
            steps=int(values[self.steps]),
            guidance=float(values[self.guidance]),
            width_px=_side_px(values[self.width], "width"),
            height_px=_side_px(values[self.height], "height"),
        )

    @staticmethod
    def _check_one_base(chosen: Sequence[AdapterView]) -> None:
        for other in chosen[1:]:
            if other.base != chosen[0].base:
                raise UserError(
                    f"{chosen[0].name} was trained on {base_label(chosen[0].base)} and "
                    f"{other.name} on {base_label(other.base)}; choose adapters of one base model"
                )

    def _weights(self, values: Values) -> dict[str, float]:
        """Strength of each adapter by its id, as the sliders have it."""
        sliders = [float(values[slider]) for slider in self.strengths]
        return dict(zip(values[self.order], sliders, strict=False))

    def _on_choice(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        known = {one.id: one for one in self.studio.library.all(owner)}
        chosen = [known[id] for id in values[self.adapters] or [] if id in known]
        return self._chosen(chosen, self._weights(values), values[self.base], values[self.basis])

    def _chosen(
        self,
        chosen: Sequence[AdapterView],
        weights: Mapping[str, float],
        base: str,
        basis: str,
    ) -> Updates:
        """What follows from the choice of adapters (or of a base, where there are none)."""
        drawn_on = chosen[0].base if chosen else base
        updates: Updates = {
            self.base: gr.update(visible=not chosen),
            self.prompt: gr.update(placeholder=example(chosen[0] if chosen else None)),
            self.compare: gr.update(interactive=bool(chosen)),
            self.sweep: gr.update(interactive=bool(chosen)),
            self.told: safety_html(drawn_on),
            self.order: [one.id for one in chosen],
            self.basis: drawn_on,
        }
        for index, slider in enumerate(self.strengths):
            if index < len(chosen):
                one = chosen[index]
                updates[slider] = gr.update(
                    visible=True, label=f"Strength of {one.name}", value=weights.get(one.id, 1.0)
                )
            else:
                updates[slider] = gr.update(visible=False, value=1.0)
        if drawn_on != basis:  # a person's own numbers stay while the base stays
            sample = defaults(config_of(drawn_on)).sample
            updates[self.steps], updates[self.guidance] = sample.steps, sample.guidance
        return updates

    def _on_refresh(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        library = self.studio.library.all(owner)
        known = {one.id: one for one in library}
        ids = [id for id in values[self.adapters] or [] if id in known]
        updates: Updates = {}
        if ids != values[self.order]:
            chosen = [known[id] for id in ids]
            weights = self._weights(values)
            updates |= self._chosen(chosen, weights, values[self.base], values[self.basis])
        updates[self.adapters] = gr.update(
            choices=[(one.name, one.id) for one in library], value=ids, visible=bool(library)
        )
        updates[self.empty] = gr.update(visible=not library)
        return updates | self._gallery(owner, values[self.limit])

    def _gallery(self, owner: str, limit: int) -> Updates:
        found = self.studio.pictures.all(owner, limit + 1)
        shown = found[:limit]
        return {
            self.gallery: gr.update(
                value=[(str(one.path), caption(one.settings)) for one in shown],
                selected_index=None,
            ),
            self.shown: [one.id for one in shown],
            self.more: gr.update(visible=len(found) > limit),
        }

    def _on_more(self, values: Values, request: gr.Request) -> Updates:
        limit = values[self.limit] + SHOWN_AT_ONCE
        return {self.limit: limit, **self._gallery(owner_of(request), limit)}

    def _on_pick(self, values: Values, request: gr.Request, event: gr.SelectData) -> Updates:
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(values[self.shown]):
            raise UserError("there is no such picture any more; load the page again")
        found = self.studio.pictures.get(owner_of(request), values[self.shown][index])
        image = picture(found.path, caption(found.settings))
        return {
            self.preview: gr.update(value=image, visible=True),
            self.settings: settings_text(found),
            self.actions: gr.update(visible=True),
            self.picked: found.id,
        }

    def _on_use(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        found = self.studio.pictures.get(owner, values[self.picked])
        return self._restored(owner, read_settings(found.path))

    def _on_drop(self, values: Values, request: gr.Request) -> Updates:
        path = self.studio.folder.uploaded(values[self.restore] or "")
        return self._restored(owner_of(request), read_settings(path))

    def _restored(self, owner: str, settings: PictureSettings) -> Updates:
        """The form as a picture's settings say."""
        library = self.studio.library.all(owner)
        known = {one.id: one for one in library}
        chosen = [known[one.id] for one in settings.adapters if one.id in known]
        missing = [one.name or one.id for one in settings.adapters if one.id not in known]
        if missing:
            gr.Warning(
                as_text(f"not among your adapters: {', '.join(missing)}; the rest was filled in")
            )
        weights = {one.id: max(-2.0, min(2.0, one.weight)) for one in settings.adapters}
        named = {defaults(name).model.base: name for name in bases()}
        base = settings.base if settings.base in bases() else named.get(settings.base, "mini")
        updates = self._chosen(chosen, weights, base, chosen[0].base if chosen else base)
        updates[self.base] = gr.update(value=base, visible=not chosen)
        updates[self.prompt] = gr.update(
            value=settings.prompt, placeholder=example(chosen[0] if chosen else None)
        )
        return updates | {
            self.adapters: gr.update(
                choices=[(one.name, one.id) for one in library], value=[one.id for one in chosen]
            ),
            self.negative: settings.negative_prompt,
            self.count: 1,
            self.seed: settings.seed,
            self.steps: settings.steps,
            self.guidance: settings.guidance,
            self.width: settings.width,
            self.height: settings.height,
            self.empty: gr.update(visible=not library),
            self.restore: None,
        }

    def _on_delete(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        self.studio.pictures.delete(owner, values[self.picked])
        return {
            self.preview: gr.update(value="", visible=False),
            self.settings: "",
            self.actions: gr.update(visible=False),
            self.picked: "",
            **self._gallery(owner, values[self.limit]),
        }

    def _on_stop(self, request: gr.Request) -> None:
        if not self.studio.sampler.stop(owner_of(request)):
            raise UserError("nothing of yours is being drawn at the moment")


def _side(label: str, elem_id: str) -> gr.Number:
    return gr.Number(
        0, label=label, precision=0, minimum=0, maximum=SIDE_AT_MOST_PX, step=8,
        elem_id=elem_id, min_width=140,
    )  # fmt: skip


def _side_px(value: Any, name: str) -> int | None:
    return _whole(value, name) or None


def _whole(value: Any, name: str) -> int:
    if value is None:
        raise UserError(f"{name}: missing; give a whole number")
    return int(value)
