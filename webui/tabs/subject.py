"""The tab "Subject": photos of somebody's dog, mug or toy, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError
from nora_diffusion.data.images import SUBJECT_LIMIT
from webui.messages import as_text, owner_of, reported
from webui.photos import FEW, RESOLUTIONS_PX
from webui.studio import Studio
from webui.subjects import SubjectView
from webui.tabs import Refresh, Updates, Values
from webui.tabs.pieces import action_list, note, told
from webui.tabs.subject_view import (
    bin_html,
    captions_html,
    list_html,
    photos_html,
    preview_html,
)

BASES = {64: "64 px (mini)", 512: "512 px (SD 1.5, 2)", 1024: "1024 px (SDXL and later)"}
RIGHTS = "I have the right to use the photos I upload, and whoever is in them agrees."
NEW = ""
"""Stands for the subject that is being made: the owner's draft."""


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _SubjectTab(studio).refresh


class _SubjectTab:
    """The tab's components by name, and their handlers."""

    def __init__(self, studio: Studio) -> None:
        self.subjects = studio.subjects
        self.open_id = gr.State(NEW)
        self.unusable = gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320):
                self._make_editor()
            with gr.Column(scale=4, min_width=280):
                self._make_lists()
        self._connect()
        self.refresh = Refresh(
            self._refresh,
            [*self.shown, self.open_id, self.rights],
            frozenset(self.view),
        )

    # --- components

    def _make_editor(self) -> None:
        self.title = gr.HTML()
        self.rights = gr.Checkbox(
            label=RIGHTS, info="Asked once.", visible=False, elem_id="subject-rights"
        )
        self.files = gr.File(
            label=f"{FEW} to {SUBJECT_LIMIT} photos",
            file_count="multiple",
            height=150,
            elem_id="subject-files",
        )
        self.resolution = gr.Radio(
            choices=[(BASES[px], px) for px in RESOLUTIONS_PX],
            value=512,
            label="Check the photos for a base model of",
            elem_id="subject-resolution",
        )
        self.photos = action_list("subject-checks", "Photos and what is wrong with them")
        with gr.Row():
            self.name = gr.Textbox(
                label="Name", placeholder="Bello", info="In your lists.", elem_id="subject-name"
            )
            self.class_name = gr.Textbox(
                label="Class word",
                placeholder="dog",
                info="The common noun for it.",
                elem_id="subject-class",
            )
            self.trigger = gr.Textbox(
                label="Trigger word",
                info="Stands for it in prompts.",
                elem_id="subject-trigger",
            )
        with gr.Accordion("Captions (optional)", open=False):
            self.captions = action_list("subject-captions", "Captions")
        with gr.Accordion("What the base model will see", open=False):
            self.shown_photo = gr.Dropdown(label="Photo", choices=[], elem_id="subject-shown")
            self.preview = gr.HTML(elem_id="subject-preview")
        self.status = gr.HTML(elem_id="subject-status")
        with gr.Row():
            self.save = gr.Button("Save subject", variant="primary", elem_id="subject-save")
            self.delete = gr.Button("Discard", elem_id="subject-delete")

    def _make_lists(self) -> None:
        gr.HTML("<h2>Your subjects</h2>")
        self.listed = action_list("subject-list", "Your subjects")
        self.new = gr.Button("New subject", elem_id="subject-new")
        with gr.Accordion("Bin", open=False):
            self.bin = action_list("subject-bin", "Bin")

    def _connect(self) -> None:
        words = {self.name, self.class_name, self.trigger}
        view = self.view = {self.open_id, self.unusable, self.resolution, self.shown_photo}
        shown = self.shown = [
            self.photos, self.preview, self.captions, self.shown_photo, self.listed, self.bin,
        ]  # fmt: skip
        texts = [self.title, self.name, self.class_name, self.trigger, self.delete]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Without a trigger: on loading the page, and whenever another subject is opened.
        gr.on(None, self._open, inputs=self.open_id, outputs=texts, **quiet)
        self.open_id.change(self._open_photos, view, [*shown, self.unusable], **quiet)
        for event in (self.files.upload, self.rights.input):
            event(
                reported(self._take), {self.files, self.rights, *view, *words},
                [*shown, self.files, self.rights, self.unusable, self.status],
                api_visibility="private", show_progress_on=[self.photos],
            )  # fmt: skip
        for box in words:
            box.blur(self._note, {self.open_id, *words}, None, **quiet)
        for choice in (self.resolution, self.shown_photo):
            choice.input(reported(self._look), view, [self.photos, self.preview], **quiet)
        self.captions.input(reported(self._caption), self.open_id, None, **quiet)
        self.photos.click(
            reported(self._remove), view, [*shown, self.unusable, self.status], **quiet
        )
        self.save.click(
            reported(self._save), {*view, *words},
            [*texts, *shown, self.open_id, self.status, self.unusable], api_visibility="private",
        )  # fmt: skip
        self.new.click(lambda: NEW, None, self.open_id, **quiet)
        self.delete.click(
            reported(self._delete), view, [self.open_id, self.status, *texts, *shown], **quiet
        )  # fmt: skip
        for component in (self.listed, self.bin):
            component.click(reported(self._act), view, [self.open_id, self.status, *shown], **quiet)

    # --- handlers

    def _refresh(self, given: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        return {
            **self._shown(owner, given),
            self.open_id: self._viewed(owner, given[self.open_id])[0],
            self.rights: gr.update(visible=not self.subjects.rights.confirmed(owner)),
        }

    def _open(self, open_id: str, request: gr.Request) -> Updates:
        return self._texts(self._viewed(owner_of(request), open_id)[1])

    def _open_photos(self, given: Values, request: gr.Request) -> Updates:
        updates = self._shown(owner_of(request), {**given, self.unusable: []})
        return {**updates, self.unusable: []}

    def _take(self, given: Values, request: gr.Request) -> Updates:
        """Keep dropped photos; those that came before the right was confirmed, after that."""
        owner = owner_of(request)
        self._note(given, request)
        if given[self.rights]:
            self.subjects.rights.confirm(owner)
        files = [(Path(path), Path(path).name) for path in given[self.files] or []]
        if files and not self.subjects.rights.confirmed(owner):
            gr.Warning("Tick the box above the photos once; then they are taken.")
            return {self.status: ""}
        id = self._subject(owner, given[self.open_id]).id
        unusable = self.subjects.photos.add(owner, id, files) if files else []
        # Where none were there yet, they may be on their way by now: those must stay.
        taken: Updates = {self.files: None} if files else {}
        return taken | {
            **self._shown(owner, {**given, self.unusable: unusable}),
            self.unusable: unusable,
            self.rights: gr.update(visible=not self.subjects.rights.confirmed(owner)),
            self.status: "",
        }

    def _note(self, given: Values, request: gr.Request) -> None:
        owner = owner_of(request)
        id = self._subject(owner, given[self.open_id]).id
        self.subjects.note(owner, id, given[self.name], given[self.class_name], given[self.trigger])

    def _look(self, given: Values, request: gr.Request) -> Updates:
        updates = self._shown(owner_of(request), given)
        return {key: updates[key] for key in (self.photos, self.preview)}

    def _caption(self, open_id: str, event: gr.EventData, request: gr.Request) -> None:
        owner = owner_of(request)
        id = self._subject(owner, open_id).id
        self.subjects.photos.set_caption(owner, id, str(event.id), str(event.text))

    def _remove(self, given: Values, event: gr.EventData, request: gr.Request) -> Updates:
        owner = owner_of(request)
        subject = self._subject(owner, given[self.open_id])
        self.subjects.photos.remove(owner, subject.id, str(event.id))
        updates = self._shown(owner, {**given, self.unusable: []})
        return {**updates, self.unusable: [], self.status: ""}

    def _save(self, given: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        id = self._subject(owner, given[self.open_id]).id
        saved = self.subjects.save(
            owner, id, given[self.name], given[self.class_name], given[self.trigger]
        )
        return {
            **self._texts(saved),
            **self._shown(owner, {**given, self.open_id: saved.id}),
            self.open_id: saved.id,
            self.unusable: [],
            self.status: told(f"{saved.name} is saved. Next: open Train and choose it."),
        }

    def _delete(self, given: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        subject = self._subject(owner, given[self.open_id])
        self.subjects.delete(owner, subject.id)
        text = "Discarded." if subject.draft else f"{subject.name} is in the bin."
        undo = "" if subject.draft else " Put it back from there within 30 days."
        return {
            **self._texts(self._subject(owner, NEW)),
            **self._shown(owner, {**given, self.open_id: NEW, self.unusable: []}),
            self.open_id: NEW,
            self.status: told(text + undo),
        }

    def _act(self, given: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """A button of the lists: open a subject; put one back; delete one for good."""
        owner, id, text = owner_of(request), str(event.id), ""
        if event.action == "open":
            return {self.open_id: self.subjects.get(owner, id).id, self.status: ""}
        if event.action == "restore":
            self.subjects.restore(owner, id)
            text = "It is back among your subjects."
        elif event.action == "purge":
            self.subjects.purge(owner, id)
            text = "Its photos, captions and everything made of them are deleted."
        return {**self._shown(owner, given), self.status: told(text)}

    # --- what is shown

    def _subject(self, owner: str, open_id: str) -> SubjectView:
        return self.subjects.get(owner, open_id) if open_id else self.subjects.draft(owner)

    def _viewed(self, owner: str, open_id: str) -> tuple[str, SubjectView]:
        """The open subject; the new one where that was deleted in another window."""
        try:
            return open_id, self._subject(owner, open_id)
        except UserError:
            return NEW, self._subject(owner, NEW)

    def _texts(self, subject: SubjectView) -> Updates:
        title = "New subject" if subject.draft else f"Edit {subject.name}"
        return {
            self.title: f"<h2>{as_text(title)}</h2>",
            self.name: subject.name,
            self.class_name: subject.class_name,
            self.trigger: subject.trigger,
            self.delete: "Discard" if subject.draft else "Delete",
        }

    def _shown(self, owner: str, given: Values) -> Updates:
        _, subject = self._viewed(owner, given[self.open_id])
        px = int(given[self.resolution])
        names = {photo.id: photo.shown_name for photo in subject.photos}
        photo_id = given.get(self.shown_photo)
        if photo_id not in names:
            photo_id = next(iter(names), None)
        checks = [*given[self.unusable], *self.subjects.photos.checks(owner, subject.id, px)]
        preview = note("Its square appears here when there is a photo.")
        if photo_id is not None:
            path = self.subjects.photos.cropped(owner, subject.id, photo_id, px)
            preview = preview_html(path, names[photo_id], px)
        return {
            self.photos: photos_html(subject, checks),
            self.captions: captions_html(subject),
            self.preview: preview,
            self.shown_photo: gr.update(
                choices=[(name, id) for id, name in names.items()], value=photo_id
            ),
            self.listed: list_html(self.subjects.all(owner), subject.id),
            self.bin: bin_html(self.subjects.binned(owner)),
        }
