"""The tab Train: what its handlers answer, and in Chromium what a person sees."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from PIL import Image

from nora_diffusion.config import UserError, load_config
from tests.webui.server import ROOT, Server
from tests.webui.test_jobs import SHORT, ended, wait
from webui.bases import bases
from webui.forecast import LIMIT_S, Forecast
from webui.jobs import JobView
from webui.models import Job
from webui.paths import DataFolder
from webui.studio import Studio
from webui.tabs.run_view import (
    duration,
    forecast_html,
    loss_svg,
    sheet_html,
    status_html,
)
from webui.tabs.train import _TrainTab

NOBODY = cast(gr.Request, SimpleNamespace(username=None))
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> _TrainTab:
    """Some seventy components take a while to make."""
    studio = Studio.open(DataFolder.open(tmp_path_factory.mktemp("built")))
    with gr.Blocks(), gr.Tab("Train"):
        return _TrainTab(studio)


@pytest.fixture
def tab(built, studio) -> _TrainTab:
    built.form.studio, built.runs.jobs = studio, studio.jobs
    return built


class Page:
    """What one page holds: the values of its components, changed by what handlers answer."""

    def __init__(self, tab: _TrainTab) -> None:
        self.tab = tab
        held = {*tab.form.chosen, tab.form.asked, tab.runs.picked, tab.runs.log_open, tab.seen}
        self.values: dict[Any, Any] = {component: component.value for component in held}

    def take(self, updates: dict[Any, Any]) -> dict[Any, Any]:
        for component, update in updates.items():
            is_component = isinstance(update, gr.blocks.Block)
            value = update.value if is_component else update
            if not is_component or value is not None:
                self.values[component] = value
        return updates

    def tick(self) -> dict[Any, Any]:
        return self.take(self.tab.on_tick(self.values, NOBODY))

    def settle(self) -> dict[Any, Any]:
        return self.take(self.tab.form.on_settle(self.values, NOBODY))

    def choose(self, component: Any, value: Any) -> None:
        self.values[component] = value
        form = self.tab.form
        if component in (form.base, form.preset):
            self.take(form.on_base(self.values))
        if component is form.steps:
            self.values[form.typed] = form.on_steps(value)
        self.settle()

    def field(self, key: str) -> Any:
        return next(f.component for f in self.tab.form.settings.fields if f.key.name == key)


@pytest.fixture
def page(tab) -> Page:
    return Page(tab)


def test_without_a_subject_the_page_says_where_to_go(tab, page):
    updates = page.tick()
    assert updates[tab.form.empty].visible and "tab Subject" in tab.form.empty.value
    assert not updates[tab.form.start].interactive and not updates[tab.form.subject].visible
    with pytest.raises(UserError, match="choose a subject first"):
        tab.form.on_start(page.values, NOBODY)


def test_the_newest_subject_is_chosen_and_a_choice_stays(tab, page, studio, subject, upload):
    page.tick()
    assert page.values[tab.form.subject] == subject.id
    photos = upload(*sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))[:2])
    newer = studio.subjects.create("", "Mug", "mug", "sks", photos)[0]
    page.tick()
    assert page.values[tab.form.subject] == newer.id
    page.values[tab.form.subject] = subject.id
    page.tick()
    assert page.values[tab.form.subject] == subject.id


def test_nothing_is_sent_again_that_a_page_shows_already(tab, page, studio, subject):
    page.tick()
    assert page.tick().keys() == {tab.seen}
    studio.jobs.submit("", subject.id, "mini", SHORT)
    changed = page.tick()
    assert {tab.runs.status, tab.runs.listed, tab.runs.cancel, tab.seen} <= changed.keys()
    assert tab.form.subject not in changed and tab.runs.log not in changed
    assert page.tick().keys() == {tab.seen}


def test_a_new_page_shows_what_runs(tab, page, studio, subject):
    id = studio.jobs.submit("", subject.id, "mini", SHORT)
    for shown in (page.tick(), Page(tab).tick()):
        assert "Next." in shown[tab.runs.status] and shown[tab.runs.listed].value == id


@pytest.mark.parametrize("base", bases())
def test_a_base_suggests_the_steps_of_its_config(tab, page, studio, subject, base):
    page.tick()
    assert page.values[tab.form.steps] == 800  # mini's
    page.choose(tab.form.base, base)
    config = load_config(base, ["data.subject=.", "data.class_name=flower"])
    assert page.values[tab.form.steps] == config.train.steps
    page.choose(page.field("train.batch_size"), 2)
    id = tab.form.on_start(page.values, NOBODY)
    with studio.jobs.sessions() as session:
        job = session.get_one(Job, id)
    assert (job.overrides, job.steps) == ({"train.batch_size": 2}, page.values[tab.form.steps])


def test_steps_that_somebody_types_stay_until_they_are_emptied(tab, page, subject):
    page.tick()
    page.choose(tab.form.steps, 200)
    for base in ("mini-128", "mini"):  # in mini-128's config are 200 as well
        page.choose(tab.form.base, base)
        assert page.values[tab.form.steps] == 200
    page.choose(tab.form.preset, "8gb")
    assert page.values[tab.form.steps] == 200
    page.choose(tab.form.steps, None)
    page.choose(tab.form.base, "mini-128")
    assert page.values[tab.form.steps] == 200
    page.choose(tab.form.base, "mini")
    assert page.values[tab.form.steps] == 800


def test_where_the_steps_are_from_is_told_beside_what_the_photos_would_give(tab, page, subject):
    page.tick()
    page.choose(page.field("train.batch_size"), 1)
    told = page.values[tab.form.explained]
    assert "Suggested: 800 steps, as in the config of this base." in told
    assert "By the number of photos it would be 500. The subject has 5 photos." in told


def test_an_answer_on_its_way_leaves_alone_what_is_typed_meanwhile(tab, page, subject):
    page.tick()
    assert tab.form.steps not in page.settle()
    page.values[tab.form.base] = "mini-128"
    sent = dict(page.values)  # twice, as a list of Gradio's does
    assert page.take(tab.form.on_base(sent))[tab.form.steps] == 200
    again = tab.form.on_base(sent | {tab.form.basis: page.values[tab.form.basis]})
    assert tab.form.steps not in again and page.field("train.learning_rate") not in again
    page.values |= {
        tab.form.base: "mini",
        tab.form.steps: 30,
    }  # nobody has told yet that 30 is typed
    assert tab.form.steps not in tab.form.on_base(page.values)


def test_a_preset_keeps_what_was_typed_and_a_base_brings_its_own(tab, page, studio, subject):
    page.tick()
    rate, batch = page.field("train.learning_rate"), page.field("train.batch_size")
    page.choose(rate, 1e-5)
    page.choose(tab.form.preset, "8gb")
    assert (page.values[rate], page.values[batch]) == (1e-5, 1)
    page.choose(tab.form.preset, "16gb")
    assert (page.values[rate], page.values[batch]) == (1e-5, 4)
    page.choose(tab.form.base, "sd15")
    assert page.values[rate] == 1e-3
    assert page.values[page.field("model.base")] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    page.choose(tab.form.base, "mini")
    assert page.values[rate] == 6e-3


def test_a_preset_is_explained_and_what_was_changed_is_told(tab, page, subject):
    page.tick()
    page.choose(tab.form.preset, "8gb")
    explained = page.values[tab.form.explained]
    assert "One picture at a time has the smallest activations." in explained
    page.choose(page.field("sample.negative_prompt"), HOSTILE)
    told = page.values[tab.form.changed]
    assert "sample.negative_prompt" in told and "train.batch_size" not in told
    assert "<img" not in told and "&lt;img" in told


def test_the_form_starts_a_run_with_just_what_differs(tab, page, studio, subject):
    page.tick()
    page.settle()
    for key, value in (("sample.n", 1), ("text_encoder.train", False)):
        page.choose(page.field(key), value)
    page.choose(tab.form.preset, "24gb")
    page.choose(tab.form.steps, 7)
    id = tab.form.on_start(page.values, NOBODY)
    with studio.jobs.sessions() as session:
        job = session.get_one(Job, id)
    assert job.overrides == {"sample.n": 1, "text_encoder.train": False, "train.steps": 7}
    assert (job.preset, job.steps, job.config) == ("24gb", 7, "mini")


def test_wrong_settings_are_told_before_the_start(tab, page, subject):
    page.tick()
    page.choose(page.field("train.batch_size"), None)
    page.choose(page.field("adapter.inner_r"), 999)
    problem = page.values[tab.form.asked][1]
    assert "2 problems" in problem and 'train.batch_size = ""' in problem
    page.tick()
    assert "adapter.inner_r = 999: must be at most" in page.values[tab.form.forecast]


@pytest.mark.slow
def test_memory_and_time_are_predicted_on_mini_out_of_the_box(tab, page, studio, subject):
    page.tick()
    page.choose(page.field("text_encoder.train"), False)
    key = page.values[tab.form.asked][0]
    end = time.monotonic() + LIMIT_S
    while not (forecast := studio.forecasts.get(key) or Forecast()).ready:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert forecast.memory[0].startswith("predicted memory: 0.0")
    assert forecast.step_s is not None and forecast.step_s > 0
    page.tick()
    assert re.search(r"about .+ for 800 steps of .+ s\. Measured", page.values[tab.form.forecast])
    assert list(studio.folder.part("cache").glob("forecast-*")) == []
    page.choose(tab.form.steps, 1600)  # twice as long, and nothing is tried again
    assert page.values[tab.form.asked][0] == key


@pytest.fixture
def view(tmp_path) -> JobView:
    return JobView(
        id="0" * 16, owner="", subject_id=None, name=HOSTILE, base=HOSTILE, state="failed",
        step=3, steps=10, loss=0.5, eta_s=None, message=HOSTILE, created_at=0.0,
        sheet=None, resumable=False, losses=((1, 1.0), (2, 0.5), (3, 0.25)),
    )  # fmt: skip


def test_texts_of_users_and_files_stay_texts(view, tmp_path):
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (3000, 100)).save(sheet)
    shown = status_html(view) + sheet_html(replace(view, sheet=sheet))
    shown += forecast_html(Forecast((HOSTILE, HOSTILE), None, HOSTILE, True), 1)
    shown += forecast_html(None, 1, HOSTILE)
    assert "<img src=x" not in shown and shown.count("&lt;img src=x") == 9
    assert 'alt="&lt;img' in shown
    sheet.write_bytes(b"being written")
    assert sheet_html(replace(view, sheet=sheet)) == ""


def test_the_plot_says_what_it_shows(view):
    svg = loss_svg(view.losses, view.steps)
    assert 'role="img"' in svg and "<title>Loss from 1.000 at step 1 to 0.250 at step 3" in svg
    assert loss_svg(view.losses[:1], 10) == ""
    assert "nan" not in loss_svg(((1, 0.0), (2, 0.0)), None)


def test_durations_in_words():
    assert [duration(s) for s in (0.2, 59.6, 61, 3599, 7260)] == [
        "0 s", "1 min 0 s", "1 min 1 s", "59 min 59 s", "2 h 1 min",
    ]  # fmt: skip


@pytest.mark.slow
def test_in_chromium_a_run_is_seen_on_every_page_and_typing_is_left_alone(studio, subject):
    from playwright.sync_api import expect, sync_playwright

    studio.jobs.submit("", subject.id, "mini", SHORT | {"train.steps": 400})
    with Server(studio.folder.root) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")

        def open_tab():
            opened = browser.new_page()
            opened.goto(server.url)
            opened.get_by_role("tab", name="Train").click()
            return opened

        page, other = open_tab(), open_tab()
        moving = re.compile(r"step [1-9]\d* of 400")
        for one in (page, other):
            expect(one.locator("#train-status")).to_contain_text(moving, timeout=240_000)
        steps = page.locator("#train-steps input")
        steps.fill("12")
        before = page.locator("#train-status").inner_text()
        expect(page.locator("#train-status")).not_to_have_text(before, timeout=60_000)
        expect(steps).to_have_value("12")
        expect(steps).to_be_focused()
        page.reload()
        page.get_by_role("tab", name="Train").click()
        expect(page.locator("#train-status")).to_contain_text(moving, timeout=60_000)
        page.locator("#train-stop").click()
        for one in (page, other):
            expect(one.locator("#train-status")).to_contain_text("Stopped", timeout=120_000)
            expect(one.locator("#train-resume")).to_be_visible()
        browser.close()


@pytest.mark.slow
def test_a_killed_server_shows_its_run_as_interrupted_and_goes_on_with_it(studio, subject):
    id = studio.jobs.submit("", subject.id, "mini", SHORT | {"train.steps": 3000})
    with Server(studio.folder.root) as server:
        wait(studio.jobs, id, lambda job: job.step >= 1)
        server.kill()
    with Server(studio.folder.root):
        left = ended(studio.jobs, id)
        assert left.state == "interrupted" and left.resumable
        studio.jobs.resume("", id)  # as the page's button does, in the database both share
        wait(studio.jobs, id, lambda job: job.state == "running" and job.step > left.step)
    assert studio.jobs.status("", id).state == "interrupted"
