"""Settings from TOML and the command line, for any schema of sections; it knows no key by name."""

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nora_diffusion.schema import (
    Section,
    allowed_values,
    element_type,
    entry_section,
    list_keys,
    nullable,
)

Schema = TypeVar("Schema", bound=BaseModel)


class UserError(ValueError):
    """A mistake the user can correct: commands print its text alone and exit with code 2."""


class ConfigError(UserError):
    """Every problem found in one set of settings.

    Attributes:
        problems: one sentence per problem, each starting with the user's key.
    """

    def __init__(self, problems: Sequence[str], source: str, cure: str = "") -> None:
        """Compose one message from all ``problems`` found in ``source``, and a common cure."""
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} in {source}:", *(f"  {problem}" for problem in problems), cure]
        super().__init__("\n".join(lines).rstrip())


def quote(value: Any) -> str:
    """A value as a user would write it in TOML; None is ``"none"``."""
    return json.dumps(_spelled(value), ensure_ascii=False, default=str)


def to_toml(config: BaseModel) -> str:
    """The whole config as TOML, every key written out; reading it back gives an equal config."""
    return tomli_w.dumps(_spelled(config.model_dump()))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: when it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(["is not UTF-8 text; save it as UTF-8"], str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"is not valid TOML: {error}"], str(path)) from None


def apply_overrides(
    schema: type[BaseModel], values: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Lay command-line settings over the values of a file.

    Args:
        schema: the model the values are for.
        values: sections of keys, as read from TOML; left as it is.
        overrides: ``"--section.key", "value"`` or ``"--section.key=value"``, dashes optional; in a
            list of tables also ``"--section.key[0].name=value"``, counted from 0.

    Returns:
        The new values, and the problems that ``validate`` cannot see.
    """
    keys = {key.name: key for key in list_keys(schema)}
    merged: dict[str, Any] = {
        name: dict(cast(dict[str, Any], section)) if isinstance(section, dict) else section
        for name, section in values.items()
    }
    given, problems = pair_overrides(overrides)
    for name, texts in given.items():
        entry = _ENTRY.fullmatch(name)
        if entry and entry["key"] in keys and entry_section(keys[entry["key"]].field):
            problem = _override_entry(keys[entry["key"]].field, merged, entry, texts)
            problems += [problem] if problem else []
            continue
        if name not in keys:
            shown = "" if texts[-1] is None else f" = {quote(texts[-1])}"
            problems.append(f"{name}{shown}: {_unknown(schema, name)}")
            continue
        if None in texts:
            problems.append(f"{name}: needs a value; write --{name} value")
            continue
        section_name, key = name.split(".")
        section = merged.setdefault(section_name, {})
        if isinstance(section, dict):  # else validate says what is wrong with the section
            section[key] = _convert(keys[name].field, cast(list[str], texts))
    return merged, problems


_ENTRY = re.compile(r"(?P<key>\w+\.\w+)\[(?P<index>\d+)\]\.(?P<name>\w+)")


def _override_entry(
    field: FieldInfo, merged: dict[str, Any], entry: re.Match[str], texts: list[str | None]
) -> str | None:
    """Set one value in one table of a list; returns what is wrong, or None."""
    section_name, key = entry["key"].split(".")
    given: Any = cast(dict[str, Any], merged.get(section_name, {})).get(key)
    tables = cast(list[Any], given) if isinstance(given, list) else []
    index, name = int(entry["index"]), entry["name"]
    if index >= len(tables) or not isinstance(tables[index], dict):
        return f"{entry[0]}: there are {len(tables)} entries in {entry['key']}, counted from 0"
    fields = cast(type[Section], entry_section(field)).model_fields
    if None in texts:
        return f"{entry[0]}: needs a value; write --{entry[0]} value"
    if name not in fields:
        return f"{entry[0]}: {_unknown_in_entry(fields, name)}"
    value = _convert(fields[name], cast(list[str], texts))
    tables = [{**t, name: value} if i == index else t for i, t in enumerate(tables)]
    merged[section_name][key] = tables
    return None


def validate(
    schema: type[Schema], values: Mapping[str, Any], source: str, problems: Sequence[str] = ()
) -> Schema:
    """Build the config, or raise with every problem at once.

    Args:
        schema: the model to build.
        values: sections of keys.
        source: where the values come from, for the message.
        problems: those already found.

    Raises:
        ConfigError: when there is any problem.
    """
    found = list(problems)
    config = None
    try:
        config = schema.model_validate(dict(values))
    except ValidationError as error:
        allowed = {key.name: key.allowed for key in list_keys(schema)}
        lines = [_explain(schema, details, values, allowed) for details in error.errors()]
        lines = [line for text in lines for line in text.split("\n")]  # a check may find several
        found.extend(dict.fromkeys(lines))  # a list or union reports one key several times
    if config is None or found:
        raise ConfigError(found, source)
    return config


def part_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part ``--section.key value`` from the rest.

    argparse knows these flags for its help only: it stops at the first bad one, and would take
    the value of an unknown one for CONFIG.
    """
    rest: list[str] = []
    overrides: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, _ = token.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(token)
            continue
        overrides.append(token)
        if not equals and tokens and not tokens[0].startswith("--"):
            overrides.append(tokens.pop(0))
    return rest, overrides


def pair_overrides(overrides: Sequence[str]) -> tuple[dict[str, list[str | None]], list[str]]:
    """Sort override tokens into texts by key, None for a flag alone; a key may be given twice."""
    given: dict[str, list[str | None]] = {}
    problems: list[str] = []
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not equals and not token.startswith("--"):
            problems.append(f"{token}: not a setting; write --section.key value")
            continue
        if not equals:
            text = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
        given.setdefault(name, []).append(text)
    return given, problems


def _convert(field: FieldInfo, texts: Sequence[str]) -> Any:
    """Texts from the command line as a field's type; what does not convert stays text."""
    text = texts[-1]
    if text == "none" and nullable(field):
        return None
    element = element_type(field)
    if entry_section(field) is not None and not text.startswith("["):
        return [_inline(text) for text in texts]
    if text.startswith("{") or (element is not None and text.startswith("[")):
        return _inline(text)
    if element is not None:
        if typing.get_origin(element) is Literal:  # choices hold no commas
            return [part.strip() for given in texts for part in given.split(",")]
        return [_scalar(element, given) for given in texts]
    return _scalar(field.annotation, text)


def _scalar(kind: Any, text: str) -> Any:
    """A text as a number, truth value or choice; what does not convert stays text."""
    try:
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError:
        return text


def _inline(text: str) -> Any:
    """A table or array as TOML writes it in one line; what is none stays text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(
    schema: type[BaseModel],
    details: ErrorDetails,
    values: Mapping[str, Any],
    allowed: Mapping[str, str],
) -> str:
    """One pydantic error in the user's terms."""
    in_entry = _explain_entry(schema, details, values)
    if in_entry is not None:
        return in_entry
    location = [str(part) for part in details["loc"]]
    name = ".".join(location[:2])
    given: Any = values
    for part in location[:2]:
        given = cast(dict[str, Any], given).get(part) if isinstance(given, dict) else None
    if details["type"] == "extra_forbidden" and (len(location) < 3):
        shown = "" if len(location) == 1 else f" = {quote(given)}"
        return f"{name}{shown}: {_unknown(schema, name)}"
    if details["type"] == "missing" and len(location) == 1:
        required = {key.name for key in list_keys(schema) if key.required}
        return (
            f"{name}: missing; give {', '.join(k for k in _keys_of(schema, name) if k in required)}"
        )
    if details["type"] == "missing" and len(location) == 2:
        field = next(key for key in list_keys(schema) if key.name == name)
        return f"{name}: missing; give it as --{name} ({field.help.rstrip('.')})"
    if len(location) <= 1 and details["type"] == "value_error":
        return details["msg"].removeprefix("Value error, ")
    if len(location) == 1:
        return f"{name} = {quote(given)}: must be a section of keys, [{name}]"
    return f"{name} = {quote(given)}: must be {allowed[name]}"


def _explain_entry(
    schema: type[BaseModel], details: ErrorDetails, values: Mapping[str, Any]
) -> str | None:
    """The same for an error inside a list of tables; None for any other."""
    location = details["loc"]
    key = ".".join(str(part) for part in location[:2])
    field = next((known.field for known in list_keys(schema) if known.name == key), None)
    section = None if field is None else entry_section(field)
    if section is None or len(location) < 4:
        return None
    given: Any = values
    for part in location[:4]:
        inside = given.get(part) if isinstance(given, dict) else given[part]  # pyright: ignore
        given = cast(Any, inside)
    name, option = f"{key}[{location[2]}].{location[3]}", str(location[3])
    if details["type"] == "extra_forbidden":
        return f"{name} = {quote(given)}: {_unknown_in_entry(section.model_fields, option)}"
    known = section.model_fields[option]
    if details["type"] == "missing":
        return f"{name}: missing ({(known.description or '').rstrip('.')})"
    return f"{name} = {quote(given)}: must be {allowed_values(known)}"


def _unknown_in_entry(fields: Mapping[str, FieldInfo], name: str) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    cure = f"did you mean {near[0]}?" if near else f"the keys there: {', '.join(fields)}"
    return f"unknown; {cure}"


def check_expression(given_as: str, text: str, cure: str) -> None:
    """Refuse a text that is no regular expression.

    Args:
        given_as: the key or option and its value, as in a message.
        text: the value.
        cure: what to give instead.

    Raises:
        UserError: saying what is wrong with it.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{given_as}: is no regular expression ({error}); give {cure}") from None


_CALLED_ELSEWHERE = {
    "loraplus_unet_lr_ratio": "loraplus_lr_ratio",
    "lr": "learning_rate", "unet_lr": "learning_rate", "network_dim": "r", "rank": "r", "dim": "r",
    "network_alpha": "scaling", "alpha": "scaling", "lora_alpha": "scaling",
    "epochs": "steps", "max_train_steps": "steps", "max_train_epochs": "steps",
    "max_steps": "steps", "num_train_epochs": "steps",
    "batch": "batch_size", "train_batch_size": "batch_size",
    "resolution": "resolution_px", "instance_data_dir": "subject", "train_data_dir": "subject",
    "instance_prompt": "trigger", "trigger_word": "trigger", "class_prompt": "class_name",
    "pretrained_model_name_or_path": "base", "base_model": "base", "output_dir": "dir",
    "mixed_precision": "dtype",
}  # fmt: skip
"""Words that other trainers have for a key, and the key's own, without its section."""


def _unknown(schema: type[BaseModel], name: str) -> str:
    keys = [key.name for key in list_keys(schema)]
    sections = list(schema.model_fields)
    if name in sections:
        return f"a section, not a key; its keys: {', '.join(_keys_of(schema, name))}"
    word = _CALLED_ELSEWHERE.get(name.split(".")[-1])
    meant = [key for key in keys if key.split(".")[1:] == [word]]
    if meant:
        of_section = [key for key in meant if key.split(".")[0] == name.split(".")[0]]
        return f"unknown; did you mean {' or '.join(of_section or meant)}?"
    near = difflib.get_close_matches(name, keys + sections, n=1, cutoff=0.8)
    if not near:  # the right key without its section, or in the wrong one
        words = [key.split(".")[1] for key in keys]
        word = difflib.get_close_matches(name.split(".")[-1], words, n=1)
        near = [key for key in keys if key.split(".")[1:] == word]
    if near:
        return f"unknown; did you mean {' or '.join(near)}?"
    section = name.split(".")[0]
    if section in sections:
        return f"unknown; the keys there: {', '.join(_keys_of(schema, section))}"
    return f"unknown; sections: {', '.join(sections)}"


def _keys_of(schema: type[BaseModel], section: str) -> list[str]:
    return [key.name for key in list_keys(schema) if key.name.startswith(f"{section}.")]


def _spelled(value: Any) -> Any:
    """A value in TOML's types: None spelled out, tuples as lists."""
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return _spelled(value.model_dump())
    if isinstance(value, Mapping):
        return {str(k): _spelled(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in cast(Sequence[Any], value)]
    return value
