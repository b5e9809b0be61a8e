"""The tab "Adapters": what has been trained or imported, and what can be done with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError
from webui.bases import base_choices
from webui.bin import days_left
from webui.export import Layout
from webui.library import AdapterView
from webui.messages import as_text, owner_of, reported
from webui.studio import Studio
from webui.tabs import Refresh, Updates, Values
from webui.tabs.pieces import (
    Action,
    action_list,
    actions,
    bin_actions,
    card,
    cards,
    day,
    note,
    picture,
    told,
)

LAYOUTS: dict[Layout, str] = {
    "native": "NoRA file",
    "diffusers": "LoRA (diffusers)",
    "kohya": "LoRA (kohya)",
}
CARD_LIMIT_LETTERS = 20_000
# The file lies in Gradio's cache by then; a link that is clicked here needs no second click.
DOWNLOAD_JS = """file => {
  const link = document.createElement('a');
  link.href = file.url;
  link.download = file.orig_name || '';
  link.click();
}"""


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    return _AdaptersTab(studio).refresh


class _AdaptersTab:
    """The tab's components by name, and their handlers."""

    def __init__(self, studio: Studio) -> None:
        self.library = studio.library
        self.open_id = gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                gr.HTML("<h2>Adapters</h2>")
                self.search = gr.Textbox(
                    label="Search", placeholder="Name, base model or trigger word",
                    elem_id="adapters-search",
                )  # fmt: skip
                self.listed = action_list("adapters-list", "Adapters")
            with gr.Column(scale=5, min_width=300):
                self._make_details()
                self.status = gr.HTML(elem_id="adapters-status")
                self._make_import()
                with gr.Accordion("Bin", open=False):
                    self.bin = action_list("adapters-bin", "Bin")
        self._connect()
        self.refresh = Refresh(self._refresh, self.shown, frozenset(self.view))

    # --- components

    def _make_details(self) -> None:
        self.facts = gr.HTML(elem_id="adapters-facts")
        with gr.Column(visible=False) as self.details:
            gr.HTML("<h3>Download</h3>")
            with gr.Row():
                self.downloads: dict[Layout, gr.Button] = {
                    layout: gr.Button(
                        label, min_width=90, size="md", elem_id=f"adapters-download-{layout}"
                    )
                    for layout, label in LAYOUTS.items()
                }
            self.file = gr.File(label="Download", visible="hidden")
            with gr.Accordion("Model card", open=False):
                self.card = gr.Textbox(
                    label="README.md", lines=12, max_lines=24, interactive=False,
                    elem_id="adapters-card",
                )  # fmt: skip
            self.name = gr.Textbox(label="Name", elem_id="adapters-name")
            with gr.Row():
                self.rename = gr.Button(
                    "Rename", min_width=90, size="md", elem_id="adapters-rename"
                )
                self.delete = gr.Button(
                    "Delete", min_width=90, size="md", elem_id="adapters-delete"
                )

    def _make_import(self) -> None:
        with gr.Accordion("Import a file", open=False):
            self.upload = gr.File(
                label="NoRA or LoRA, .safetensors",
                height=150,
                elem_id="adapters-import",
            )
            self.base = gr.Dropdown(
                choices=[("The file says it", ""), *base_choices()],
                value="",
                label="Base model it was trained on",
                info="One of these, or a Hugging Face id (owner/name).",
                allow_custom_value=True,
                elem_id="adapters-import-base",
            )
            self.new_name = gr.Textbox(
                label="Name", info="Empty: the file's own.", elem_id="adapters-import-name"
            )
            self.take = gr.Button("Import", variant="primary", elem_id="adapters-import-start")

    def _connect(self) -> None:
        view = self.view = {self.open_id, self.search}
        shown = self.shown = [
            self.listed, self.bin, self.open_id, self.facts, self.details, self.name, self.card,
            *self.downloads.values(),
        ]  # fmt: skip
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.search.input(reported(self._refresh), view, shown, **quiet)
        for component in (self.listed, self.bin):
            component.click(reported(self._act), view, [*shown, self.status], **quiet)
        for button in (self.rename.click, self.name.submit):
            button(reported(self._rename), {*view, self.name}, [*shown, self.status], **quiet)
        self.delete.click(reported(self._delete), view, [*shown, self.status], **quiet)
        self.take.click(
            reported(self._import), {*view, self.upload, self.base, self.new_name},
            [*shown, self.status, self.upload, self.new_name], api_visibility="private",
            show_progress_on=self.take,
        )  # fmt: skip
        for layout, button in self.downloads.items():
            made = button.click(
                reported(self._downloader(layout)), self.open_id, self.file,
                api_visibility="private", show_progress_on=button,
            )  # fmt: skip
            made.success(None, self.file, None, js=DOWNLOAD_JS, api_visibility="private")

    # --- handlers

    def _refresh(self, given: Values, request: gr.Request) -> Updates:
        return self._shown(owner_of(request), given[self.open_id], given[self.search])

    def _act(self, given: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """A button of the lists: open an adapter; put one back; delete one for good."""
        owner, id, text, opened = owner_of(request), str(event.id), "", given[self.open_id]
        if event.action == "open":
            opened = self.library.get(owner, id).id
        elif event.action == "restore":
            self.library.restore(owner, id)
            text, opened = "It is back among your adapters.", id
        elif event.action == "purge":
            self.library.purge(owner, id)
            text = "It is deleted for good. Its run stays under Train."
        return {**self._shown(owner, opened, given[self.search]), self.status: told(text)}

    def _rename(self, given: Values, request: gr.Request) -> Updates:
        owner, id = owner_of(request), given[self.open_id]
        renamed = self.library.rename(owner, id, given[self.name])
        text = told(f"It is called {renamed.name} now.")
        return {**self._shown(owner, id, given[self.search]), self.status: text}

    def _delete(self, given: Values, request: gr.Request) -> Updates:
        owner = owner_of(request)
        adapter = self.library.get(owner, given[self.open_id])
        self.library.delete(owner, adapter.id)
        text = told(f"{adapter.name} is in the bin. Put it back from there within 30 days.")
        return {**self._shown(owner, "", given[self.search]), self.status: text}

    def _import(self, given: Values, request: gr.Request) -> Updates:
        owner, path = owner_of(request), given[self.upload]
        if not path:
            raise UserError("no file yet; choose a .safetensors file")
        adapter = self.library.import_file(
            owner, Path(path), given[self.new_name] or "", given[self.base] or "", Path(path).name
        )
        return {
            **self._shown(owner, adapter.id, given[self.search]),
            self.status: told(f"{adapter.name} is imported. Use it in Create."),
            self.upload: None,
            self.new_name: "",
        }

    def _downloader(self, layout: Layout):
        def download(open_id: str, request: gr.Request) -> str:
            return str(self.library.download(owner_of(request), open_id, layout))

        return download

    # --- what is shown

    def _shown(self, owner: str, open_id: str, search: str) -> Updates:
        found = self.library.all(owner)
        opened = next((one for one in found if one.id == open_id), None)
        fitting = [one for one in found if _fits(one, search)]
        is_nora = opened is not None and opened.kind == "nora"
        return {
            self.listed: _list_html(fitting, open_id, empty=not found),
            self.bin: _bin_html(self.library.binned(owner)),
            self.open_id: opened.id if opened else "",
            self.facts: _facts_html(opened, bool(found)),
            self.details: gr.update(visible=opened is not None),
            self.name: opened.name if opened else "",
            self.card: _card_text(opened),
            self.downloads["native"]: LAYOUTS["native"] if is_nora else "LoRA file",
            self.downloads["diffusers"]: gr.update(visible=is_nora),
            self.downloads["kohya"]: gr.update(visible=is_nora),
        }


def _fits(adapter: AdapterView, search: str | None) -> bool:
    texts = (adapter.name, adapter.base, adapter.trigger, adapter.class_name, adapter.family)
    words = " ".join(text for text in texts if text).casefold()
    return all(word in words for word in (search or "").casefold().split())


def _list_html(found: Sequence[AdapterView], open_id: str, empty: bool) -> str:
    items = []
    for one in found:
        called = " ".join(word for word in (one.trigger, one.class_name) if word)
        lines = [" · ".join(part for part in (one.base, called) if part), _numbers(one)]
        opened = actions(Action("open", "Open", one.id, one.name))
        image = picture(one.thumbnail, f"A picture made with {one.name}")
        items.append(card(image, one.name, lines, opened, chosen=one.id == open_id))
    return cards(items, "None yet. Train one, or import a file." if empty else "None fits.")


def _bin_html(found: Sequence[AdapterView]) -> str:
    items = []
    for one in found:
        left = days_left(one.deleted_at or 0)
        buttons = bin_actions(one.id, one.name)
        lines = [one.base, f"gone for good in {left} days"]
        items.append(card(picture(one.thumbnail, ""), one.name, lines, buttons))
    return cards(items, "Empty. What you delete stays here for 30 days.")


def _facts_html(adapter: AdapterView | None, any: bool) -> str:
    if adapter is None:
        return note("Open one of the list to download, rename or delete it.") if any else ""
    rows = {
        "Kind": "NoRA" if adapter.kind == "nora" else "LoRA",
        "Base model": adapter.base,
        "Family": adapter.family,
        "Trigger word": adapter.trigger,
        "Class word": adapter.class_name,
        "Rank": _rank(adapter).removeprefix("rank "),
        "Steps": None if adapter.steps is None else f"{adapter.steps:,}",
        "Last loss": None if adapter.loss is None else f"{adapter.loss:.4f}",
        "Size": _size(adapter.size_bytes),
        "Made": day(adapter.created_at),
    }
    listed = "".join(
        f"<div><dt>{name}</dt><dd>{as_text(str(value))}</dd></div>"
        for name, value in rows.items()
        if value
    )
    image = picture(adapter.thumbnail, f"A picture made with {adapter.name}")
    title = f"<h2>{as_text(adapter.name)}</h2>"
    return f'{title}<div class="n-facts">{image}<dl>{listed}</dl></div>'


def _numbers(adapter: AdapterView) -> str:
    steps = "" if adapter.steps is None else f"{adapter.steps:,} steps"
    loss = "" if adapter.loss is None else f"loss {adapter.loss:.3f}"
    parts = (_rank(adapter), steps, loss, _size(adapter.size_bytes), day(adapter.created_at))
    return " · ".join(part for part in parts if part)


def _rank(adapter: AdapterView) -> str:
    if adapter.r is None:
        return ""
    return f"rank {adapter.r}" + ("" if adapter.inner_r is None else f" / {adapter.inner_r}")


def _size(size: int) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _card_text(adapter: AdapterView | None) -> str:
    if adapter is None or adapter.card is None:
        return "This file came without a model card."
    return adapter.card.read_text(encoding="utf-8", errors="replace")[:CARD_LIMIT_LETTERS]
