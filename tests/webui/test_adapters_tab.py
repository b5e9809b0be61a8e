"""The tab Adapters: what its handlers answer, and in Chromium what a person sees."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest

from nora_diffusion.config import UserError
from tests.webui.server import Server
from webui.library import AdapterView
from webui.library_files import CARD, LORA, NATIVE
from webui.models import Job
from webui.paths import DataFolder, new_id
from webui.studio import Studio
from webui.tabs.adapters import _AdaptersTab

NOBODY = cast(gr.Request, SimpleNamespace(username=None))
HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = Path("/usr/bin/chromium")


def adopted(studio: Studio, run: Path, name: str = "Hibiscus") -> AdapterView:
    """The adapter of a run that a job with this name has finished."""
    id = new_id()
    shutil.copytree(run, studio.folder.of("runs", id))
    with studio.library.sessions.begin() as session:
        session.add(
            Job(id=id, owner="", name=name, base="mini", config="mini", state="done", position=1.0)
        )
    adapter = studio.library.adopt(id)
    assert adapter is not None
    return adapter


@pytest.fixture
def tab(studio) -> _AdaptersTab:
    with gr.Blocks(), gr.Tab("Adapters"):
        return _AdaptersTab(studio)


def given(tab: _AdaptersTab, open_id: str = "", **other: Any) -> dict[Any, Any]:
    values: dict[Any, Any] = {tab.open_id: open_id, tab.search: ""}
    return values | {getattr(tab, name): value for name, value in other.items()}


def event(action: str, id: str) -> gr.EventData:
    return gr.EventData(None, {"action": action, "id": id})


def test_an_empty_library_says_what_to_do(tab):
    shown = tab._refresh(given(tab), NOBODY)
    assert "None yet. Train one, or import a file." in shown[tab.listed]
    assert shown[tab.details]["visible"] is False and shown[tab.facts] == ""


def test_cards_facts_and_search(tab, studio, finished_run):
    rose = adopted(studio, finished_run, "Rose")
    adopted(studio, finished_run, "Tulip")
    shown = tab._act(given(tab), event("open", rose.id), NOBODY)
    assert "rank 160 / 8 · 2 steps · loss " in shown[tab.listed]
    for fact in ("mini", "sks", "flower", "160 / 8", "<dd>2</dd>", "kB"):
        assert fact in shown[tab.facts]
    assert shown[tab.name] == "Rose" and shown[tab.card].startswith("---\nbase_model:")
    assert shown[tab.listed].count('aria-current="true"') == 1

    def found(text: str) -> list[bool]:
        html = tab._refresh(given(tab, search=text), NOBODY)[tab.listed]
        return [f"<h3>{name}</h3>" in html for name in ("Rose", "Tulip")]

    assert found("tul") == [False, True]
    assert found("MINI sks") == [True, True]
    assert found("rose nothing") == [False, False]


def test_rename_delete_put_back(tab, studio, finished_run):
    adapter = adopted(studio, finished_run)
    shown = tab._rename(given(tab, adapter.id, name="Rose"), NOBODY)
    assert "It is called Rose now." in shown[tab.status] and "<h3>Rose</h3>" in shown[tab.listed]
    shown = tab._delete(given(tab, adapter.id), NOBODY)
    assert shown[tab.open_id] == "" and "gone for good in 30 days" in shown[tab.bin]
    with pytest.raises(UserError, match="no adapter"):
        tab._act(given(tab), event("open", adapter.id), NOBODY)
    shown = tab._act(given(tab), event("restore", adapter.id), NOBODY)
    assert shown[tab.open_id] == adapter.id
    tab._delete(given(tab, adapter.id), NOBODY)
    shown = tab._act(given(tab), event("purge", adapter.id), NOBODY)
    assert "Empty." in shown[tab.bin] and studio.library.binned("") == []


def test_import_and_download(tab, studio, upload, finished_run):
    ((path, _),) = upload(finished_run / LORA)
    values = given(tab, upload=str(path), base="", new_name="Bought")
    shown = tab._import(values, NOBODY)
    assert "Bought is imported" in shown[tab.status] and shown[tab.upload] is None
    assert shown[tab.downloads["native"]] == "LoRA file"
    assert shown[tab.downloads["kohya"]]["visible"] is False
    assert shown[tab.card] == "This file came without a model card."
    file = Path(tab._downloader("native")(shown[tab.open_id], NOBODY))
    assert file.name == "bought.safetensors"
    assert file.read_bytes() == (finished_run / LORA).read_bytes()
    with pytest.raises(UserError, match="no file yet"):
        tab._import({**values, tab.upload: None}, NOBODY)
    with pytest.raises(UserError, match="not uploaded"):
        tab._import({**values, tab.upload: str(studio.folder.database)}, NOBODY)


def test_texts_of_people_and_files_are_shown_letter_by_letter(tab, studio, finished_run):
    adapter = adopted(studio, finished_run, HOSTILE)
    (adapter.path.parent / CARD).write_text(f"# {HOSTILE}")
    shown = tab._act(given(tab), event("open", adapter.id), NOBODY)
    for part in (tab.listed, tab.facts):
        assert "<img src=x" not in shown[part] and "&lt;img src=x onerror" in shown[part]
    assert shown[tab.card] == f"# {HOSTILE}"  # a text box: never HTML
    assert "<img src=x" not in tab._delete(given(tab, adapter.id), NOBODY)[tab.status]
    assert "&lt;img src=x" in tab._refresh(given(tab), NOBODY)[tab.bin]


@pytest.mark.slow
def test_in_chromium_from_the_list_to_the_bin(tmp_path, finished_run):
    """Open, download all layouts, rename, delete, put back, import, a refused import."""
    if not CHROMIUM.is_file():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    from playwright.sync_api import expect, sync_playwright
    from safetensors import safe_open

    data = tmp_path / "data"
    studio = Studio.open(DataFolder.open(data))
    adopted(studio, finished_run)
    studio.close()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04nothing")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright, Server(data) as server:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(120_000)
        page.goto(server.url)
        page.get_by_role("tab", name="Adapters").click()
        listed, status = page.locator("#adapters-list"), page.locator("#adapters-status")
        listed.get_by_role("button", name="Open: Hibiscus").press("Enter")
        expect(page.locator("#adapters-facts")).to_contain_text("160 / 8")
        for layout, name, key in (
            ("native", "hibiscus-nora", ".nora_inner_A"),
            ("diffusers", "hibiscus-lora-diffusers", ".lora_A.weight"),
            ("kohya", "hibiscus-lora-kohya", ".lora_down.weight"),
        ):
            with page.expect_download() as loaded:
                page.click(f"#adapters-download-{layout}")
            assert loaded.value.suggested_filename == f"{name}.safetensors"
            with safe_open(loaded.value.path(), "numpy") as file:
                assert any(tensor.endswith(key) for tensor in file.keys())  # noqa: SIM118
        page.fill("#adapters-name textarea", "Rose")
        page.click("#adapters-rename")
        expect(listed.get_by_role("heading", name="Rose")).to_be_visible()
        page.click("#adapters-delete")
        expect(listed).to_contain_text("None yet")
        panel = page.locator("#tab-adapters")
        panel.get_by_role("button", name="Bin").click()
        page.get_by_role("button", name="Put back: Rose").click()
        expect(listed.get_by_role("heading", name="Rose")).to_be_visible()
        panel.get_by_role("button", name="Import a file").click()
        chosen = "#adapters-import input[type=file]"
        page.set_input_files(chosen, bad)
        expect(page.locator("#adapters-import")).to_contain_text("bad.safetensors")
        page.click("#adapters-import-start")
        expect(page.get_by_text("this is a pickle or ZIP file")).to_be_visible()
        page.locator("#adapters-import").get_by_label("Clear").click()
        page.set_input_files(chosen, finished_run / NATIVE)
        expect(page.locator("#adapters-import")).to_contain_text("adapter.safetensors")
        page.click("#adapters-import-start")
        expect(status).to_contain_text("adapter is imported")
        expect(listed.get_by_role("heading")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
        browser.close()
