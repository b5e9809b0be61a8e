"""The tab "Create": pictures from prompts, with one to four adapters, and the gallery."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError
from webui.api import SAMPLING
from webui.messages import owner_of, reported
from webui.pictures import read_settings
from webui.studio import Studio
from webui.tabs import Refresh, Updates, Values
from webui.tabs.create_form import CreateForm
from webui.tabs.create_gallery import CreateGallery
from webui.tabs.create_view import (
    COMPARED,
    SWEPT,
    caption,
    problem_html,
    safety_html,
    sheet_caption,
    told_html,
)

SHOW_RESULTS = (
    "() => { document.getElementById('create-results').scrollIntoView({block: 'nearest'}); }"
)


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _CreateTab(studio).refresh


class _CreateTab:
    """Form, results and gallery, and the handlers that concern more than one of them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.form = CreateForm(studio)
                self._make_buttons()
            with gr.Column(scale=6, min_width=320):
                self._make_results()
        self.gallery = CreateGallery(studio.pictures)
        self._connect()

    # --- components

    def _make_buttons(self) -> None:
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

    # --- events

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        form, gallery = self.form, self.gallery
        form.connect(quiet)
        gallery.connect(quiet)
        beside = [self.compare, self.sweep, self.told]  # what ``_with_buttons`` may change
        for event in (form.adapters.input, form.base.input):
            event(reported(self._on_choice), form.components, [*form.followers, *beside], **quiet)
        buttons: dict[Callable[..., Any], tuple[float, ...]] = {
            self.generate.click: (1.0,),
            form.prompt.submit: (1.0,),
            self.compare.click: COMPARED,
            self.sweep.click: SWEPT,
        }
        for event, strengths in buttons.items():
            self._connect_drawing(event, strengths, quiet)
        self.stop.click(reported(self._on_stop), None, None, **quiet)
        restored = [*form.components, form.empty, *beside, gallery.restore]
        gallery.use.click(reported(self._on_use), {gallery.picked}, restored, **quiet)
        gallery.restore.upload(reported(self._on_drop), {gallery.restore}, restored, **quiet)
        self.refresh = Refresh(
            self._on_refresh,
            [*form.components, form.empty, *beside, *gallery.components],
            frozenset({*form.components, gallery.limit}),
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
            draw, {*self.form.components, self.gallery.limit},
            [self.results, self.told, self.stop, *self.gallery.components],
            api_visibility="private", show_progress_on=self.results,
            concurrency_id=SAMPLING, concurrency_limit=1,
        )  # fmt: skip
        drawn.failure(lambda: gr.update(visible=False), None, self.stop, **quiet)

    # --- handlers

    def _draw(
        self, values: Values, strengths: tuple[float, ...], owner: str, progress: gr.Progress
    ) -> Updates:
        request = dataclasses.replace(self.form.request(values, owner), strengths=strengths)
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
            **self.gallery.shown(owner, values[self.gallery.limit]),
        }

    def _with_buttons(self, updates: Updates) -> Updates:
        """Changes of the form, and of what beside it depends on adapters and base."""
        if self.form.basis not in updates:
            return updates
        adapted = bool(updates[self.form.order])
        return updates | {
            self.compare: gr.update(interactive=adapted),
            self.sweep: gr.update(interactive=adapted),
            self.told: safety_html(updates[self.form.basis]),
        }

    def _on_choice(self, values: Values, request: gr.Request) -> Updates:
        return self._with_buttons(self.form.follow(values, owner_of(request)))

    def _on_refresh(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        form = self._with_buttons(self.form.refreshed(values, owner))
        return form | self.gallery.shown(owner, values[self.gallery.limit])

    def _on_use(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        found = self.studio.pictures.get(owner, values[self.gallery.picked])
        return self._with_buttons(self.form.restored(read_settings(found.path), owner))

    def _on_drop(self, values: Values, request: gr.Request) -> Updates:
        path = self.studio.folder.uploaded(values[self.gallery.restore] or "")
        form = self.form.restored(read_settings(path), owner_of(request))
        return self._with_buttons(form) | {self.gallery.restore: None}

    def _on_stop(self, request: gr.Request) -> None:
        if not self.studio.sampler.stop(owner_of(request)):
            raise UserError("nothing of yours is being drawn at the moment")
