"""How a schema of sections is declared, and what can be read off it: key names, help, ranges."""

import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class Section(BaseModel):
    """Base of all sections: frozen, strict; ``"none"`` spells None, which TOML lacks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _spell_none(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            name: None if value == "none" and name in fields and nullable(fields[name]) else value
            for name, value in cast(dict[str, Any], data).items()
        }

    @field_validator("*")
    @classmethod
    def _more_than_spaces(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a text must not be empty, spaces alone are as good as none."""
        if isinstance(value, str) and value.isspace():
            limits = cls.model_fields[str(info.field_name)].metadata
            if any(isinstance(limit, MinLen) for limit in limits):
                raise ValueError("blank")  # told in the user's terms by settings.validate
        return value


class RunConfig(Section):
    """Base of the whole schemas: all settings of one run of a training command.

    Attributes:
        command: what users type before CONFIG.
    """

    command: ClassVar[str]


def setting(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    resume: bool = False,
    allowed: str | None = None,
    required: bool = False,
    **limits: Any,
) -> Any:
    """Declare one key of a section.

    Args:
        default: its value where nobody gives one; ``...`` makes the key required.
        help: one sentence for ``--help``, the reference page and form fields.
        unit: unit of a number.
        resume: whether the key may change when a run is resumed.
        allowed: what is allowed, where the type and ``limits`` do not say it well.
        required: whether to present it as required though it has a default, because a check of the
            whole section asks for it.
        limits: pydantic's ``ge gt le lt multiple_of min_length strict``.
    """
    extra: dict[str, Any] = {
        "unit": unit, "resume": resume, "allowed": allowed, "required": required,
    }  # fmt: skip
    return Field(default, description=help, json_schema_extra=extra, **limits)


@dataclass(frozen=True)
class Key:
    """What help texts, reference pages and forms need to know about one key.

    Attributes:
        name: ``section.key``.
        section: the section's class.
        required: whether it has no default.
        default: the default, or None where it is required.
        help: one sentence.
        allowed: the values it takes, in words.
        unit: unit of a number, or None.
        resume: whether it may change when a run is resumed.
    """

    name: str
    section: type[BaseModel]
    field: FieldInfo
    required: bool
    default: Any
    help: str
    allowed: str
    unit: str | None
    resume: bool


def list_keys(schema: type[BaseModel]) -> tuple[Key, ...]:
    """All keys of a schema, in its order."""
    keys: list[Key] = []
    for section_name, section_field in schema.model_fields.items():
        section = cast(type[BaseModel], section_field.annotation)
        for name, field in section.model_fields.items():
            extra = cast(dict[str, Any], field.json_schema_extra)
            keys.append(
                Key(
                    name=f"{section_name}.{name}",
                    section=section,
                    field=field,
                    required=field.is_required() or extra["required"],
                    default=None if field.default is PydanticUndefined else field.default,
                    help=field.description or "",
                    allowed=allowed_values(field),
                    unit=extra["unit"],
                    resume=may_change(field),
                )
            )
    return tuple(keys)


def get_key(config: BaseModel, name: str) -> Any:
    """The value of ``section.key``."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def nullable(field: FieldInfo) -> bool:
    """Whether a field may be None."""
    return type(None) in _options(field.annotation)


def element_type(field: FieldInfo) -> Any | None:
    """Type of a list's elements, or None where the field is no list."""
    for option in _options(field.annotation):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return None


def entry_section(field: FieldInfo) -> type[Section] | None:
    """The section that each entry of a list of tables is, or None where the field is no such list.

    In TOML: ``[[section.key]]``.
    """
    element = element_type(field)
    return element if isinstance(element, type) and issubclass(element, Section) else None


def may_change(field: FieldInfo) -> bool:
    """Whether a resumed run may have another value of a field than the run before it."""
    return bool(cast(dict[str, Any], field.json_schema_extra)["resume"])


def allowed_values(field: FieldInfo) -> str:
    """The values a field takes, in words."""
    told = cast(dict[str, Any], field.json_schema_extra)["allowed"]
    return told or _allowed(field)


def _allowed(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name)}"
        for kind, name, sign in (
            (Ge, "ge", ">="),
            (Gt, "gt", ">"),
            (Le, "le", "<="),
            (Lt, "lt", "<"),
        )
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    limits += [
        f"a multiple of {m.multiple_of}" for m in field.metadata if isinstance(m, MultipleOf)
    ]
    filled = any(isinstance(limit, MinLen) for limit in field.metadata)
    options = _options(field.annotation)
    return ", or ".join(_words(option, " and ".join(limits), filled) for option in options)


def _words(option: Any, limits: str, filled: bool) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(option))
    a = "a non-empty" if filled else "a"
    if typing.get_origin(option) is tuple:
        inner = typing.get_args(option)[0]
        choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ["texts"]
        return f"{a} list of {', '.join(choices)}"
    if option in (int, float):
        return f"a {'whole ' if option is int else ''}number {limits}".strip()
    return {type(None): "none", bool: "true or false", str: f"{a} text"}[option]
