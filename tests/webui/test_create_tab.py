"""The tab "Create": what its form asks for, and what pictures put back into it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gradio as gr
import pytest

from nora_diffusion.config import UserError
from tests.webui.test_pictures import GOOD, png
from webui.paths import new_id
from webui.pictures import PictureView
from webui.tabs.create import _CreateTab
from webui.tabs.create_view import has_safety_checker, settings_text

REQUEST = SimpleNamespace(username=None)


@pytest.fixture
def tab(studio):
    with gr.Blocks():
        yield _CreateTab(studio)


@pytest.fixture
def adapter(studio, upload, finished_run):
    ((path, _),) = upload(finished_run / "adapter.safetensors")
    return studio.library.import_file("", path, "Mine <b>", "")


def value_of(update):
    return update["value"] if isinstance(update, dict) and "value" in update else update


def filled_in(tab, *updates, **given):
    """The form's values on the page after some updates, and then as a person changed them."""
    values = {component: component.value for component in tab.form.components}
    values |= {tab.gallery.limit: tab.gallery.limit.value}
    for update in updates:
        values |= {
            component: value_of(change)
            for component, change in update.items()
            if component in values and (not isinstance(change, dict) or "value" in change)
        }
    return values | {getattr(tab.form, name): value for name, value in given.items()}


def test_without_adapters_the_base_alone_can_be_tried(tab):
    shown = tab._on_refresh(filled_in(tab), REQUEST)
    assert shown[tab.form.empty]["visible"] and not shown[tab.form.adapters]["visible"]
    asked = tab.form.request(filled_in(tab, shown, prompt="a cat "), "")
    assert (asked.base, asked.prompt, asked.adapters) == ("mini", "a cat", ())
    assert (asked.steps, asked.guidance, asked.width_px, asked.height_px) == (25, 3.0, None, None)
    with pytest.raises(UserError, match="prompt: write what to draw"):
        tab.form.request(filled_in(tab, shown, prompt="  "), "")
    with pytest.raises(UserError, match="base model: choose"):
        tab.form.request(filled_in(tab, shown, prompt="a", base="/etc"), "")


def test_a_chosen_adapter_brings_its_words_and_a_slider(tab, adapter):
    values = filled_in(tab, tab._on_refresh(filled_in(tab), REQUEST), adapters=[adapter.id])
    chosen = tab._on_choice(values, REQUEST)
    assert "a sks flower" in chosen[tab.form.prompt]["placeholder"]
    assert chosen[tab.compare]["interactive"] and not chosen[tab.form.base]["visible"]
    sliders = [chosen[slider]["visible"] for slider in tab.form.strengths]
    assert sliders == [True, False, False, False]
    values = filled_in(tab, chosen, adapters=[adapter.id], prompt="x")
    values[tab.form.strengths[0]] = 0.4
    asked = tab.form.request(values, "")
    (used,) = asked.adapters
    assert (used.id, used.weight, used.path) == (adapter.id, 0.4, adapter.path)
    with pytest.raises(UserError, match="no adapter called"):
        tab.form.request(values, "somebody else")


def test_strengths_stay_with_their_adapters_when_others_leave(tab, adapter, upload, finished_run):
    ((path, _),) = upload(finished_run / "pytorch_lora_weights.safetensors")
    other = tab.studio.library.import_file("", path, "Other", "mini")
    both = filled_in(tab, adapters=[adapter.id, other.id], prompt="x", order=[adapter.id, other.id])
    both[tab.form.strengths[0]], both[tab.form.strengths[1]] = 0.3, -0.5
    assert [one.weight for one in tab.form.request(both, "").adapters] == [0.3, -0.5]
    left = tab._on_choice(both | {tab.form.adapters: [other.id]}, REQUEST)
    assert left[tab.form.strengths[0]]["value"] == -0.5 and left[tab.form.order] == [other.id]
    assert other.name in left[tab.form.strengths[0]]["label"]


def test_a_dropped_picture_fills_in_the_form(tab, adapter, studio):
    settings = GOOD | {"adapters": [{"id": adapter.id, "name": "x", "weight": 1.25}], "steps": 7}
    folder = studio.folder.part("uploads") / new_id()
    folder.mkdir()
    path = png(folder / "a.png", json.dumps(settings))
    restored = tab._on_drop({tab.gallery.restore: str(path)}, REQUEST)
    asked = tab.form.request(filled_in(tab, restored), "")
    assert (asked.prompt, asked.seed, asked.steps, asked.n) == ("a sks flower", 5, 7, 1)
    assert (asked.width_px, asked.height_px, asked.guidance) == (64, 64, 3.0)
    assert [(one.id, one.weight) for one in asked.adapters] == [(adapter.id, 1.25)]


def test_a_picture_of_somebody_elses_names_what_is_missing(tab, studio, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", told.append)
    folder = studio.folder.part("uploads") / new_id()
    folder.mkdir()
    theirs = [{"id": "0123456789abcdef", "name": "<b>Theirs", "weight": 1.0}]
    path = png(folder / "a.png", json.dumps(GOOD | {"adapters": theirs, "base": "/etc/passwd"}))
    restored = tab._on_drop({tab.gallery.restore: str(path)}, REQUEST)
    assert "&lt;b&gt;Theirs" in told[0]
    asked = tab.form.request(filled_in(tab, restored), "")
    assert (asked.adapters, asked.base) == ((), "mini")
    with pytest.raises(UserError, match="was not uploaded"):
        tab._on_drop({tab.gallery.restore: "/etc/passwd"}, REQUEST)


def test_settings_are_shown_as_text(studio, tmp_path):
    picture = PictureView("0" * 16, tmp_path / "a.png", GOOD, 0.0)
    lines = settings_text(picture).splitlines()
    assert "Adapters: Hibiscus (1)" in lines and "Seed: 5" in lines
    assert lines[-1] == "AI-generated"


def test_the_state_of_the_safety_checker_is_known_before_anything_is_loaded(tmp_path):
    assert has_safety_checker("mini") is False
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": ["a", "B"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert has_safety_checker(str(tmp_path)) is True
    assert has_safety_checker("owner/name") is None
