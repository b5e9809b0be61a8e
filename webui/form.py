"""The form for a run's settings, made from the config schema: nothing here knows a key by name."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr
from gradio.components import Component

from nora_diffusion.config import DreamboothConfig
from nora_diffusion.schema import Key, element_type, get_key, list_keys, nullable
from webui.recipe import spell

NONE = "none"


@dataclass(frozen=True)
class Control:
    """How one kind of value is shown and read.

    Attributes:
        make: makes the component, given the texts and marks that all have in common.
        show: a value of the config, as the component takes it.
        read: what the component holds, as an override.
        limits: whether to say what is allowed; components to choose from show it.
    """

    make: Callable[..., Component]
    show: Callable[[Any], Any]
    read: Callable[[Any], Any]
    limits: bool = False


@dataclass(frozen=True)
class Field:
    """One setting in the form."""

    key: Key
    control: Control
    component: Component

    def differs(self, given: Any, config: DreamboothConfig) -> bool:
        """Whether what the component holds is other than what the config says."""
        read, show = self.control.read, self.control.show
        return read(given) != read(show(get_key(config, self.key.name)))


class Form:
    """The fields that were made, and what is in them."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)

    @property
    def components(self) -> list[Component]:
        """All components, in the order of the schema."""
        return [field.component for field in self.fields]

    def shown(self, config: DreamboothConfig) -> dict[Component, Any]:
        """What each component shows of a config."""
        return {
            field.component: field.control.show(get_key(config, field.key.name))
            for field in self.fields
        }

    def overrides(self, given: Mapping[Component, Any], config: DreamboothConfig) -> dict[str, Any]:
        """The settings that differ from the config's, by key.

        Args:
            given: what each component holds.
            config: the settings of the chosen base and preset.
        """
        return {
            field.key.name: field.control.read(given[field.component])
            for field in self.fields
            if field.differs(given[field.component], config)
        }


def make_field(key: Key, config: DreamboothConfig, label: str = "", elem_id: str = "") -> Field:
    """A labelled component for a key, showing the config's value."""
    control = control_of(key)
    name = label or key.name.split(".")[1].replace("_", " ")
    component = control.make(
        value=control.show(get_key(config, key.name)),
        label=name if key.unit is None or name.endswith(key.unit) else f"{name} ({key.unit})",
        info=key.help + (f" Allowed: {key.allowed}." if control.limits else ""),
        elem_id=elem_id or f"setting-{key.name.replace('.', '-')}",
    )
    return Field(key, control, component)


def sections(leave_out: Sequence[str]) -> list[tuple[str, str, list[Key]]]:
    """Name, description and keys of each section of the schema, without some keys."""
    found: dict[str, tuple[str, str, list[Key]]] = {}
    for key in list_keys(DreamboothConfig):
        name = key.name.split(".")[0]
        about = (key.section.__doc__ or "").rstrip(".")
        section = found.setdefault(name, (name, about, []))
        if key.name not in leave_out:
            section[2].append(key)
    return [section for section in found.values() if section[2]]


def control_of(key: Key) -> Control:
    """The control that fits the type of a key."""
    field, empty = key.field, nullable(key.field)
    types_ = [option for option in _options(field.annotation) if option is not type(None)]
    element = element_type(field)
    if element is not None:
        return _choices(typing.get_args(element)) if _is_literal(element) else _lines(empty)
    if types_ == [bool]:
        return _pick(("true", "false"), empty, _as_bool) if empty else _CHECKBOX
    if len(types_) == 1 and _is_literal(types_[0]):
        return _pick(typing.get_args(types_[0]), empty, str)
    if types_ in ([int], [float]):
        return _NUMBER_OR_NONE if empty else number(types_[0])
    return _text(empty) if types_ == [str] else _WRITTEN


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Literal


def _as_bool(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text)


def _pick(choices: Sequence[str], empty: bool, read: Callable[[str], Any]) -> Control:
    """One of a few, perhaps none."""
    listed = [*choices, NONE] if empty and NONE not in choices else list(choices)

    def make(**common: Any) -> Component:
        return gr.Dropdown(choices=listed, **common)

    return Control(make, spell, lambda given: None if empty and given == NONE else read(given))


def _choices(choices: Sequence[str]) -> Control:
    """Several of a few, in the order of the schema."""

    def make(**common: Any) -> Component:
        return gr.CheckboxGroup(choices=list(choices), **common)

    return Control(make, list, lambda given: [choice for choice in choices if choice in given])


def _lines(empty: bool) -> Control:
    """A list of texts, one a line."""

    def make(**common: Any) -> Component:
        common["info"] += " One a line" + ("; empty: none." if empty else ".")
        return gr.Textbox(lines=2, max_lines=8, **common)

    def read(given: str | None) -> list[str] | None:
        lines = [line.strip() for line in (given or "").splitlines() if line.strip()]
        return lines if lines or not empty else None

    return Control(make, lambda value: "\n".join(value or ()), read)


def number(type_: type) -> Control:
    """A number that must be there."""

    def read(given: float | None) -> Any:
        if given is None:
            return ""  # the schema says what is allowed instead
        return int(given) if type_ is int and float(given).is_integer() else given

    return Control(lambda **common: gr.Number(**common), lambda value: value, read, limits=True)


def _text(empty: bool) -> Control:
    def make(**common: Any) -> Component:
        common["info"] += " Empty: none." if empty else ""
        return gr.Textbox(max_lines=1, **common)

    def read(given: str | None) -> str | None:
        return (given or "").strip() or (None if empty else "")

    return Control(make, lambda value: value or "", read)


_CHECKBOX = Control(lambda **common: gr.Checkbox(**common), lambda value: value, bool)

# A text: the page turns an empty number component into 0 as soon as it is drawn.
_NUMBER_OR_NONE = Control(
    _text(True).make,
    lambda value: "" if value is None else spell(value),
    lambda given: (given or "").strip() or None,
    limits=True,
)

# What takes values of several kinds is written as on the command line.
_WRITTEN = Control(
    lambda **common: gr.Textbox(max_lines=1, **common),
    spell,
    lambda given: (given or "").strip(),
    limits=True,
)
