"""Reading, overriding and saving the settings of a run, for the schema of any command."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from nora_diffusion.disk import write_atomically
from nora_diffusion.presets import Choice
from nora_diffusion.schema import Key, RunConfig, entry_section, get_key, list_keys, may_change
from nora_diffusion.settings import (
    ConfigError,
    UserError,
    apply_overrides,
    quote,
    read_toml,
    to_toml,
    validate,
)

Config = TypeVar("Config", bound=RunConfig)

RUN_CONFIG = "config.toml"
"""Name of the resolved config inside a run folder."""

_CONTINUE = "# Continue this run with: "

RECIPES = "recipes"
"""Folder of the recipes among the shipped configs, which lists of those leave out."""


def shipped_configs(command: str) -> dict[str, Path]:
    """The configs for a command that come with the package, by name.

    Their first line says which command they are for.
    """
    return {path.stem: path for path in _shipped("*.toml") if _is_for(command, path)}


def shipped_recipes(command: str) -> dict[str, Path]:
    """The recipes of docs/recipes.md for a command, by name: ``"recipes/..."``."""
    found = _shipped(f"{RECIPES}/*.toml")
    return {f"{RECIPES}/{path.stem}": path for path in found if _is_for(command, path)}


def _shipped(pattern: str) -> list[Path]:
    package = Path(__file__).parent
    # A wheel carries them inside the package; a checkout keeps them at its top level.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return sorted(folder.glob(pattern), key=lambda path: path.stem)  # mini before mini-128


def _is_for(command: str, path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith(f"# {command} ")


def load_config(
    schema: type[Config],
    source: str | Path,
    overrides: Sequence[str] = (),
    choices: Sequence[Choice] = (),
) -> Config:
    """Read a config file or a shipped config, and lay choices and then overrides over it.

    Args:
        schema: of the command the config is for.
        source: path of a TOML file, or the name of a shipped config such as ``"mini"``.
        overrides: as on the command line: ``"--train.steps", "300"`` or ``"train.steps=300"``.
        choices: of a preset.

    Raises:
        ConfigError: naming every problem at once.
    """
    given = _lay_over(read_toml(find_config(schema.command, source)), choices)
    values, problems = apply_overrides(schema, given, overrides)
    origin = f"{source} and the command line" if overrides else str(source)
    return validate(schema, values, origin, problems)


def _lay_over(values: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """A preset's choices over the values of a file."""
    merged = dict(values)
    for choice in choices:
        section, key = choice.key.split(".")
        given = merged.get(section, {})
        if isinstance(given, dict):  # else validate says what is wrong with the section
            merged[section] = {**cast(dict[str, Any], given), key: choice.value}
    return merged


def find_config(command: str, source: str | Path) -> Path:
    """The file behind a path or the name of a shipped config or recipe for a command.

    Raises:
        ConfigError: when there is no such file and nothing shipped of that name.
    """
    shipped = shipped_configs(command)
    named = shipped | shipped_recipes(command)
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if str(source) in named:
        return named[str(source)]
    near = difflib.get_close_matches(str(source), named, n=1)
    problem = f"CONFIG = {quote(str(source))}: no such file, nor one of {', '.join(shipped)}"
    problem += f"; did you mean {near[0]}?" if near else ""
    raise ConfigError([problem], "the command line")


def save_config(config: RunConfig, folder: str | Path) -> Path:
    """Write the resolved config into a run folder, atomically; returns its path."""
    path = Path(folder) / RUN_CONFIG
    text = f"{_CONTINUE}{config.command} --resume DIR\n{to_toml(config)}"
    write_atomically(path, text.encode())
    return path


def command_of(path: Path) -> str | None:
    """The command whose run a saved config is of, by its first line; None where that is gone."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError):  # reading it as TOML tells
        return None
    found = first.removeprefix(_CONTINUE).partition(" --resume")[0].strip()
    return found if first.startswith(_CONTINUE) and found else None


def _spoilt(command: str) -> str:
    return (
        "The run's checkpoints do not depend on this file. Print the settings the run was started "
        f"with by {command} CONFIG ... --dry-run (with another --output.dir), put them in its "
        "place, and resume: they are compared with those of the checkpoint."
    )


def load_run(
    schema: type[Config],
    folder: str | Path,
    overrides: Sequence[str] = (),
    choices: Sequence[Choice] = (),
) -> Config:
    """The config of an existing run, for resuming it.

    Args:
        schema: of the command the run is of.
        folder: the run folder; it becomes ``output.dir``, so a run may have been moved.
        overrides: may change only the keys that leave finished steps as they are (and repeat
            any other key with the run's own value).
        choices: of a preset, taken before the overrides, under the same rule.

    Raises:
        UserError: when the run is of another command.
        ConfigError: when an override contradicts the run, or its config is spoilt.
    """
    path = Path(folder) / RUN_CONFIG
    other = command_of(path)
    if other is not None and other != schema.command:
        raise UserError(f"{folder}: this is a run of {other}, not of {schema.command}")
    try:
        saved = read_toml(path)
        if isinstance(output := saved.setdefault("output", {}), dict):
            output["dir"] = str(folder)
        before = validate(schema, saved, str(path))
    except ConfigError as error:
        raise ConfigError(error.problems, str(path), _spoilt(schema.command)) from None
    given = _lay_over(saved, choices)
    values, problems = apply_overrides(schema, given, overrides)
    after = validate(schema, values, f"{path} and the command line", problems)

    keys = list_keys(schema)
    free = ", ".join(key.name for key in keys if key.resume)
    contradictions = [
        f"{key.name} = {quote(get_key(after, key.name))}: this run was started with "
        f"{quote(get_key(before, key.name))}"
        for key in keys
        if not key.resume and _differs(key, before, after)
    ]
    if contradictions:
        cure = f"A resumed run can change only {free}; for others start one in a new output.dir."
        raise ConfigError(contradictions, f"the settings for resuming {folder}", cure)
    return after


def _differs(key: Key, before: RunConfig, after: RunConfig) -> bool:
    """Whether a key that a resumed run must keep has changed."""
    old, new = get_key(before, key.name), get_key(after, key.name)
    if key.name == "output.dir":
        return Path(old).resolve() != Path(new).resolve()
    if (entry := entry_section(key.field)) is not None:
        free = {name for name, field in entry.model_fields.items() if may_change(field)}
        old, new = ([table.model_dump(exclude=free) for table in each] for each in (old, new))
    return old != new
