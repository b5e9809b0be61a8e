"""The tab Subject: what its handlers answer, and in Chromium what a person sees."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest

from nora_diffusion.config import UserError
from tests.webui.server import ROOT, Server
from webui.tabs.subject import NEW, _SubjectTab

NOBODY = cast(gr.Request, SimpleNamespace(username=None))
BERT = cast(gr.Request, SimpleNamespace(username="bert"))
HOSTILE = "<img src=x onerror=alert(1)>\"'`${1}{{x}}"
SAMPLES = sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture
def tab(studio) -> _SubjectTab:
    with gr.Blocks(), gr.Tab("Subject"):
        return _SubjectTab(studio)


def given(tab: _SubjectTab, open_id: str = NEW, **other: Any) -> dict[Any, Any]:
    values: dict[Any, Any] = {
        tab.open_id: open_id,
        tab.unusable: [],
        tab.resolution: 512,
        tab.shown_photo: None,
        tab.rights: False,
        tab.files: None,
        tab.name: "",
        tab.class_name: "",
        tab.trigger: "sks",
    }
    return values | {getattr(tab, name): value for name, value in other.items()}


def event(action: str = "", id: str = "", text: str = "") -> gr.EventData:
    return gr.EventData(None, {"action": action, "id": id, "text": text})


def sent(upload, *paths: Path) -> list[str]:
    return [str(path) for path, _ in upload(*paths)]


def test_photos_wait_until_the_right_is_confirmed(tab, upload):
    files = sent(upload, *SAMPLES)
    answer = tab._take(given(tab, files=files, name="Bello"), BERT)
    assert set(answer) == {tab.status}  # the files stay where they were dropped
    assert tab.subjects.draft("bert").photos == ()
    answer = tab._take(given(tab, files=files, name="Bello", rights=True), BERT)
    assert len(tab.subjects.draft("bert").photos) == 5
    assert answer[tab.files] is None and answer[tab.rights]["visible"] is False
    assert tab.subjects.draft("bert").name == "Bello"


def test_photos_that_come_while_the_right_is_being_confirmed_stay(tab):
    assert tab.files not in tab._take(given(tab, files=None, rights=True), BERT)


def test_what_is_wrong_is_told_beside_each_photo_until_the_next_upload(tab, upload, tmp_path):
    bad = tmp_path / "notes.jpg"
    bad.write_text("no photo")
    values = given(tab, files=sent(upload, bad, *SAMPLES))
    answer = tab._take(values, NOBODY)
    assert "notes.jpg</strong> cannot be used: not an image" in answer[tab.photos]
    assert answer[tab.photos].count("too small: 256 x 256 px") == 5
    later = tab._look({**values, tab.unusable: answer[tab.unusable], tab.resolution: 64}, NOBODY)
    assert "notes.jpg" in later[tab.photos] and "too small" not in later[tab.photos]
    again = tab._take(given(tab, files=sent(upload, SAMPLES[0])), NOBODY)
    assert "notes.jpg" not in again[tab.photos] and again[tab.unusable] == []


def test_nothing_that_was_typed_is_lost_after_an_error(tab, upload, studio):
    tab._take(given(tab, files=sent(upload, *SAMPLES)), NOBODY)
    values = given(tab, name="Bello", class_name="", trigger="zxw")
    tab._note(values, NOBODY)
    with pytest.raises(UserError, match="class word: missing"):
        tab._save(values, NOBODY)
    texts = tab._open(NEW, NOBODY)
    assert (texts[tab.name], texts[tab.trigger]) == ("Bello", "zxw")
    answer = tab._save({**values, tab.class_name: "dog"}, NOBODY)
    (saved,) = studio.subjects.all("")
    assert answer[tab.open_id] == saved.id and "Bello is saved" in answer[tab.status]
    assert tab._open(NEW, NOBODY)[tab.name] == ""


def test_texts_of_people_are_shown_letter_by_letter(tab, studio, upload):
    ((path, _),) = upload(SAMPLES[0])
    subject, _ = studio.subjects.create("", HOSTILE, HOSTILE, HOSTILE, [(path, HOSTILE)])
    studio.subjects.photos.set_caption("", subject.id, subject.photos[0].id, HOSTILE)
    shown = {**tab._refresh(given(tab, subject.id), NOBODY), **tab._open(subject.id, NOBODY)}
    html = {key: shown[key] for key in (tab.photos, tab.captions, tab.preview, tab.listed)}
    for text in (*html.values(), shown[tab.title]):
        assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
        assert "onerror" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", text)
    studio.subjects.delete("", subject.id)
    assert "&lt;img src=x onerror" in tab._refresh(given(tab), NOBODY)[tab.bin]


def test_a_subject_that_was_deleted_elsewhere_gives_way_to_the_new_one(tab, studio, subject):
    studio.subjects.delete("", subject.id)
    shown = tab._refresh(given(tab, subject.id), NOBODY)
    assert shown[tab.open_id] == NEW and "No photos yet" in shown[tab.photos]
    with pytest.raises(UserError, match="no such subject"):
        tab._save(given(tab, subject.id, name="A", class_name="b"), NOBODY)
    assert studio.subjects.draft("").name == ""


def test_the_lists_open_put_back_and_delete(tab, studio, subject):
    answer = tab._act(given(tab), event("open", subject.id), NOBODY)
    assert answer[tab.open_id] == subject.id
    answer = tab._delete(given(tab, subject.id), NOBODY)
    assert answer[tab.open_id] == NEW and "Hibiscus is in the bin" in answer[tab.status]
    assert "gone for good in 30 days" in answer[tab.bin]
    tab._act(given(tab), event("restore", subject.id), NOBODY)
    assert studio.subjects.all("") == [subject]
    tab._delete(given(tab, subject.id), NOBODY)
    for action, id in (("open", subject.id), ("restore", "../x"), ("purge", "0" * 16)):
        with pytest.raises(UserError, match="no such subject"):
            tab._act(given(tab), event(action, id), NOBODY)
    tab._act(given(tab), event("purge", subject.id), NOBODY)
    assert studio.subjects.binned("") == []


def test_captions_and_single_photos(tab, studio, subject):
    first = subject.photos[0].id
    tab._caption(subject.id, event(id=first, text="a {trigger}"), NOBODY)
    shown = tab._refresh(given(tab, subject.id), NOBODY)
    assert 'value="a {trigger}"' in shown[tab.captions]
    answer = tab._remove(given(tab, subject.id), event("remove", first), NOBODY)
    assert first not in answer[tab.captions] and len(studio.subjects.all("")[0].photos) == 4
    with pytest.raises(UserError, match="not there any more"):
        tab._remove(given(tab, subject.id), event("remove", first), NOBODY)


@pytest.mark.slow
def test_in_chromium_from_photos_to_the_bin(tmp_path):
    """Upload, warnings, caption, save, reload, restart, edit, delete, put back, delete for good."""
    if not CHROMIUM.is_file():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    from playwright.sync_api import expect, sync_playwright

    bad = tmp_path / "notes.jpg"
    bad.write_text("no photo")
    data = tmp_path / "data"
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        checks, listed = page.locator("#subject-checks"), page.locator("#subject-list")
        name = page.locator("#subject-name textarea")
        trigger = page.locator("#subject-trigger textarea")

        def wide() -> int:
            return page.evaluate("document.documentElement.scrollWidth - innerWidth")

        with Server(data) as server:
            page.goto(server.url)
            expect(trigger).to_have_value("sks")
            page.set_input_files("#subject-files input[type=file]", [*SAMPLES, bad])
            expect(page.get_by_text("Tick the box above the photos")).to_be_visible()
            page.get_by_label("I have the right to use").check()
            expect(checks.locator("img")).to_have_count(5)
            expect(checks).to_contain_text("notes.jpg cannot be used: not an image")
            expect(checks).to_contain_text("too small: 256 x 256 px")
            page.get_by_label("64 px (mini)").check()
            expect(checks).not_to_contain_text("too small")
            assert wide() == 0
            name.fill("Hibiscus")
            page.click("#subject-save")
            expect(page.get_by_text("class word: missing")).to_be_visible()
            page.reload()
            expect(name).to_have_value("Hibiscus")
            expect(checks.locator("img")).to_have_count(5)
            page.fill("#subject-class textarea", "flower")
            page.get_by_role("button", name="Captions (optional)").click()
            page.get_by_role("textbox", name="02.jpg").fill("a {trigger} {class_name} `${1}` <b>")
            page.click("#subject-save")
            expect(page.locator("#subject-status")).to_contain_text("Hibiscus is saved")
            expect(listed.get_by_role("heading", name="Hibiscus")).to_be_visible()
        with Server(data) as server:
            page.goto(server.url)
            expect(checks).to_contain_text("No photos yet")
            listed.get_by_role("button", name="Edit: Hibiscus").press("Enter")
            expect(checks.locator("img")).to_have_count(5)
            expect(page.get_by_role("heading", name="Edit Hibiscus")).to_be_visible()
            page.get_by_role("button", name="Captions (optional)").click()
            caption = page.get_by_role("textbox", name="02.jpg")
            expect(caption).to_have_value("a {trigger} {class_name} `${1}` <b>")
            page.get_by_role("button", name="Remove: 05.jpg").click()
            expect(checks.locator("img")).to_have_count(4)
            page.click("#subject-delete")
            expect(page.locator("#subject-status")).to_contain_text("Hibiscus is in the bin")
            expect(listed).to_contain_text("None saved yet")
            page.locator("#tab-subject").get_by_role("button", name="Bin").click()
            page.get_by_role("button", name="Put back: Hibiscus").click()
            expect(listed).to_contain_text("4 photos")
            listed.get_by_role("button", name="Edit: Hibiscus").click()
            expect(checks.locator("img")).to_have_count(4)
            page.click("#subject-delete")
            purge = page.get_by_role("button", name="Delete for good: Hibiscus")
            page.once("dialog", lambda dialog: dialog.dismiss())
            purge.click()
            page.wait_for_timeout(500)
            expect(purge).to_be_visible()
            asked: list[str] = []
            page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
            purge.click()
            expect(page.locator("#subject-bin")).to_contain_text("Empty")
            assert asked == ["Delete Hibiscus for good? It cannot be put back then."]
            assert wide() == 0
            photos = {path.read_bytes() for path in SAMPLES}
            files = [path for path in data.rglob("*") if path.is_file()]
            assert [path for path in files if path.read_bytes() in photos] == []
        browser.close()
