"""The form is the schema: every key is in it or withheld, and every value comes back as it was."""

from __future__ import annotations

import gradio as gr
import pytest

from nora_diffusion.config import DreamboothConfig, load_config, shipped_configs
from nora_diffusion.presets import PRESETS
from nora_diffusion.schema import get_key, list_keys
from webui.bases import bases, defaults
from webui.form import Form, control_of, make_field, sections
from webui.recipe import WITHHELD, spell
from webui.tabs.train_form import FIRST

KEYS = {key.name: key for key in list_keys(DreamboothConfig)}


@pytest.fixture(scope="module")
def form() -> Form:
    """All that can be set, for mini."""
    config = defaults("mini")
    with gr.Blocks():
        listed = [key for _, _, keys in sections(tuple(WITHHELD)) for key in keys]
        return Form([make_field(key, config) for key in listed])


def test_every_key_is_in_the_form_or_withheld_for_a_reason(form):
    advanced = [key.name for _, _, keys in sections((*WITHHELD, *FIRST)) for key in keys]
    assert sorted([*advanced, *WITHHELD, *FIRST]) == sorted(KEYS)
    assert {field.key.name for field in form.fields} == KEYS.keys() - WITHHELD.keys()


def test_a_field_says_what_the_schema_says(form):
    for field in form.fields:
        told = str(field.component.info)  # pyright: ignore
        assert told.startswith(field.key.help)
        if field.key.unit is not None:
            assert field.key.unit in str(field.component.label)  # pyright: ignore
    rate = next(field for field in form.fields if field.key.name == "train.learning_rate")
    assert "Allowed: a number > 0." in str(rate.component.info)  # pyright: ignore


def test_kinds_of_values_get_fitting_components(form):
    kinds = {field.key.name: type(field.component) for field in form.fields}
    assert kinds["train.batch_size"] is kinds["train.offset_noise"] is gr.Number
    assert kinds["data.flip"] is gr.Checkbox
    assert kinds["train.optimizer"] is kinds["output.dtype"] is kinds["output.portable"]
    assert kinds["output.portable"] is gr.Dropdown
    assert kinds["adapter.targets"] is gr.CheckboxGroup
    assert kinds["sample.prompts"] is kinds["adapter.timestep_rank"] is gr.Textbox
    assert kinds["train.ema_decay"] is gr.Textbox  # as a number, an empty one would become 0


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("base", shipped_configs())
def test_an_untouched_form_changes_nothing(form, base, preset):
    config = defaults(base, preset)
    assert form.overrides(form.shown(config), config) == {}


@pytest.mark.parametrize(
    ("key", "typed", "expected"),
    [
        ("train.batch_size", 2, 2),
        ("train.batch_size", 2.0, 2),
        ("train.learning_rate", 1e-5, 1e-5),
        ("train.learning_rate", 1, 1.0),
        ("train.ema_decay", " 0.99 ", 0.99),
        ("data.resolution_px", "128", 128),
        ("text_encoder.train", False, False),
        ("data.flip", True, True),
        ("train.optimizer", "prodigy", "prodigy"),
        ("model.quantize", "nf4", "nf4"),
        ("output.dtype", "fp16", "fp16"),
        ("output.portable", "false", False),
        ("adapter.targets", ["convolution", "attention"], ("attention", "convolution")),
        ("adapter.target_modules", "to_q\n\n to_k ", ("to_q", "to_k")),
        ("sample.prompts", "a {trigger}, \"b\"\n--x=1", ('a {trigger}, "b"', "--x=1")),
        ("sample.negative_prompt", "blurred, --dark", "blurred, --dark"),
        ("adapter.timestep_rank", "1.5", 1.5),
        ("adapter.timestep_rank", "{ alpha = 2.0, k_min = 3 }", {"alpha": 2.0, "k_min": 3}),
        ("train.steps", "auto", "auto"),
        ("train.steps", "25", 25),
        ("model.base", " owner/name ", "owner/name"),
    ],
)  # fmt: skip
def test_what_is_typed_is_what_the_run_gets(form, key, typed, expected):
    config = defaults("mini")
    components = {field.key.name: field.component for field in form.fields}
    overrides = form.overrides(form.shown(config) | {components[key]: typed}, config)
    assert list(overrides) == [key]
    extra = ["train.learning_rate=1"] if typed == "prodigy" else []
    tokens = [f"{name}={spell(value)}" for name, value in overrides.items()]
    sources = ["data.subject=x", "data.class_name=y", *extra, *tokens]
    assert get_key(load_config("mini", sources), key) == expected


@pytest.mark.parametrize(
    ("base", "key", "emptied"),
    [
        ("sd15", "data.resolution_px", " "),
        ("mini", "adapter.target_modules", ""),
        ("mini", "output.dtype", "none"),
        ("mini", "output.portable", "none"),
    ],
)
def test_an_emptied_field_that_may_be_empty_is_none(base, key, emptied):
    assert control_of(KEYS[key]).read(emptied) is None
    if base == "sd15":
        read = spell(control_of(KEYS[key]).read(emptied))
        tokens = ["data.subject=x", "data.class_name=y", f"{key}={read}"]
        assert get_key(load_config(base, tokens), key) is None


@pytest.mark.parametrize(("key", "typed"), [("train.batch_size", None), ("adapter.r", 1.5)])
def test_what_cannot_be_is_left_to_the_schema_to_explain(key, typed):
    value = spell(control_of(KEYS[key]).read(typed))
    with pytest.raises(ValueError, match=f"{key} = .*: must be a whole number >= 1"):
        load_config("mini", ["data.subject=x", "data.class_name=y", f"{key}={value}"])


def test_every_shipped_config_has_a_name_for_people():
    assert list(bases())[0] == "mini" and bases().keys() == shipped_configs().keys()
    assert all(label != name for name, label in bases().items())
