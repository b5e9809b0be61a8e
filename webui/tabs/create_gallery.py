"""The gallery of the tab "Create": all pictures of a person, and how each was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError
from webui.messages import owner_of, reported
from webui.pictures import Pictures
from webui.tabs import Updates, Values
from webui.tabs.create_view import caption, settings_text
from webui.tabs.pieces import picture

SHOWN_AT_ONCE = 30


class CreateGallery:
    """The gallery's components by name, and the handlers that concern it alone."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self.gallery = gr.Gallery(
                    label="All your pictures, newest first", columns=5, object_fit="contain",
                    height="auto", type="filepath", interactive=False, allow_preview=False,
                    elem_id="create-gallery",
                )  # fmt: skip
                self.more = gr.Button("Show older pictures", size="sm", visible=False)
            with gr.Column(scale=5, min_width=320):
                self._make_details()
        self.ids = gr.State([])  # of the pictures that are shown
        self.limit = gr.State(SHOWN_AT_ONCE)
        self.picked = gr.State("")  # id of the picture whose settings are shown
        self.components = [self.gallery, self.ids, self.more]

    def _make_details(self) -> None:
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

    def connect(self, quiet: Mapping[str, Any]) -> None:
        """Connect what concerns the gallery alone; ``quiet``: keywords of its events."""
        self.more.click(self._on_more, {self.limit}, [self.limit, *self.components], **quiet)
        picked = [self.preview, self.settings, self.actions, self.picked]
        self.gallery.select(reported(self._on_pick), {self.ids}, picked, **quiet)
        self.delete.click(
            reported(self._on_delete), {self.picked, self.limit},
            [*picked, *self.components], **quiet,
        )  # fmt: skip

    def shown(self, owner: str, limit: int) -> Updates:
        """The newest pictures, ``limit`` at most."""
        found = self.pictures.all(owner, limit + 1)
        shown = found[:limit]
        return {
            self.gallery: gr.update(
                value=[(str(one.path), caption(one.settings)) for one in shown],
                selected_index=None,
            ),
            self.ids: [one.id for one in shown],
            self.more: gr.update(visible=len(found) > limit),
        }

    def _on_more(self, values: Values, request: gr.Request) -> Updates:
        limit = values[self.limit] + SHOWN_AT_ONCE
        return {self.limit: limit, **self.shown(owner_of(request), limit)}

    def _on_pick(self, values: Values, request: gr.Request, event: gr.SelectData) -> Updates:
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(values[self.ids]):
            raise UserError("there is no such picture any more; load the page again")
        found = self.pictures.get(owner_of(request), values[self.ids][index])
        image = picture(found.path, caption(found.settings))
        return {
            self.preview: gr.update(value=image, visible=True),
            self.settings: settings_text(found),
            self.actions: gr.update(visible=True),
            self.picked: found.id,
        }

    def _on_delete(self, values: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        self.pictures.delete(owner, values[self.picked])
        return {
            self.preview: gr.update(value="", visible=False),
            self.settings: "",
            self.actions: gr.update(visible=False),
            self.picked: "",
            **self.shown(owner, values[self.limit]),
        }
