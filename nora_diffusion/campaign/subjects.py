"""The table of a campaign: one subject a line, checked as a whole before anything starts."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nora_diffusion.config import RUN_CONFIG, DreamboothConfig, load_config
from nora_diffusion.data.images import read_photos
from nora_diffusion.events import read_events
from nora_diffusion.schema import get_key, list_keys
from nora_diffusion.settings import (
    ConfigError,
    UserError,
    pair_overrides,
    quote,
    read_toml,
    validate,
)

ADAPTER = "adapter.safetensors"
EVENTS = "events.jsonl"
SUMMARY = "summary.csv"
LOG = ".log"
"""Ending of the file beside a run folder that its output goes to."""

COLUMNS = {"subject": "data.subject", "class_name": "data.class_name", "trigger": "data.trigger"}
"""Short names of columns, and the keys they stand for."""

NEEDED = ("subject", "class_name")
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class SubjectRun:
    """One line of the table.

    Attributes:
        line: its number, counted from 1, the header's.
        name: of its run folder.
        folder: the run folder, absolute.
        overrides: its settings, as on the command line.
        config: all its settings.
        done: whether the run is finished already.
    """

    line: int
    name: str
    folder: Path
    overrides: tuple[str, ...]
    config: DreamboothConfig
    done: bool

    @property
    def started(self) -> bool:
        """Whether there is a run to continue."""
        return (self.folder / RUN_CONFIG).is_file()


def read_table(
    path: str | Path, source: str, overrides: Sequence[str], preset: str | None, out: Path
) -> list[SubjectRun]:
    """Read the table and check every line of it.

    Args:
        path: a CSV file with the columns ``subject`` and ``class_name``, and any of ``trigger``,
            ``name`` (of the run folder) and ``section.key``; an empty cell changes nothing.
        source: the config all runs start from.
        overrides: settings for all, as on the command line; a cell goes before them.
        preset: name of one of ``presets.PRESETS``, or None.
        out: the folder of all run folders.

    Raises:
        ConfigError: naming every problem with its line.
    """
    given, _ = pair_overrides(overrides)
    own = {"data.subject": "the column subject", "data.class_name": "the column class_name",
           "output.dir": "--out, which holds a folder for each subject"}  # fmt: skip
    problems = [f"{key}: give it in {place}" for key, place in own.items() if key in given]
    if problems:
        raise ConfigError(problems, "the command line")
    # What is wrong for all is told once, not for each line.
    load_config(source, [*overrides, "--data.subject=folder", "--data.class_name=noun"], preset)

    shared = {key: [text for text in texts if text is not None] for key, texts in given.items()}
    runs: list[SubjectRun] = []
    lines = list(_read_cells(Path(path).expanduser()))
    problems += _same_names(lines)
    for line, cells in lines:
        try:
            runs.append(_check_line(line, cells, source, shared, preset, out))
        except UserError as error:
            found = error.problems if isinstance(error, ConfigError) else (str(error),)
            problems += [f"line {line}: {problem}" for problem in found]
    problems += _same_uploads(runs)
    if problems:
        problems.sort(key=lambda text: int(text.split(":")[0].removeprefix("line ")))
        raise ConfigError(problems, str(path))
    return runs


def check_bases(
    runs: Sequence[SubjectRun], path: str | Path, check: Callable[[DreamboothConfig], object]
) -> None:
    """Find out which settings do not fit their base, once for all lines that share them.

    Args:
        runs: of the table.
        path: of the table.
        check: raises a `UserError` where settings do not fit.

    Raises:
        ConfigError: naming every problem with its line.
    """
    own = {"data": {"subject", "class_name", "trigger"}, "output": True}
    alike: dict[str, list[SubjectRun]] = {}
    for run in runs:
        alike.setdefault(run.config.model_dump_json(exclude=own), []).append(run)
    problems = []
    for first, *others in alike.values():
        try:
            check(first.config)
        except UserError as error:
            as_well = f" (and {len(others)} more with the same settings)" if others else ""
            problems.append(f"line {first.line}{as_well}: {error}")
    if problems:
        raise ConfigError(problems, str(path))


def _read_cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the cells that are not empty, by column, of each line below the header."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(["is not UTF-8 text; save it as CSV UTF-8"], str(path)) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        lines = [(line, row) for line, row in lines if any(row)]
    except csv.Error as error:
        raise ConfigError([f"line {reader.line_num}: is not CSV: {error}"], str(path)) from None
    header = lines[0][1] if lines else []
    problems = _header_problems(header) if lines else ["is empty; its first line names the columns"]
    if len(lines) == 1 and not problems:
        problems.append("has no line below the header; give a subject a line")
    problems += [
        f"line {line}: {len(row)} cells, but {len(header)} columns; quote a text with commas"
        for line, row in lines[1:]
        if len(row) > len(header)
    ]
    if problems:
        raise ConfigError(problems, str(path))
    for line, row in lines[1:]:
        yield line, {column: cell for column, cell in zip(header, row, strict=False) if cell}


def _header_problems(header: Sequence[str]) -> list[str]:
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            return [f"line 1: columns are parted by commas, not by {called}; save it as CSV so"]
    known = {key.name for key in list_keys(DreamboothConfig)}
    problems = [f"line 1: no column {name}" for name in NEEDED if name not in header]
    for column in dict.fromkeys(header):
        short = next((name for name, key in COLUMNS.items() if key == column), None)
        if header.count(column) > 1:
            problems.append(f"line 1: column {quote(column)} is there {header.count(column)} times")
        if short is not None:
            problems.append(f"line 1: column {column}: call it {short}")
        elif column == "output.dir":
            problems.append("line 1: column output.dir: give a name; the folder is --out/name")
        elif column not in known and column not in (*COLUMNS, "name"):
            near = difflib.get_close_matches(column.lower(), [*COLUMNS, "name", *known], n=1)
            allowed = f"{', '.join(COLUMNS)}, name and any section.key of docs/config.md"
            cure = f"did you mean {near[0]}?" if near else f"allowed are {allowed}"
            problems.append(f"line 1: column {quote(column)}: unknown; {cure}")
    return problems


def _check_line(
    line: int,
    cells: dict[str, str],
    source: str,
    shared: dict[str, list[str]],
    preset: str | None,
    out: Path,
) -> SubjectRun:
    """One run of the table.

    Raises:
        UserError: with all that is wrong with this line.
    """
    problems = [f"{name}: missing" for name in NEEDED if name not in cells]
    name = _name(cells)
    if not _NAME.fullmatch(name) and "subject" in cells:
        problems.append(
            f"name = {quote(name)}: must be letters, digits, _, - and ., as it names a folder"
        )
    if name.lower() == SUMMARY or name.lower().endswith(LOG):
        problems.append(
            f"name = {quote(name)}: the campaign keeps {SUMMARY} and a log NAME{LOG} for each run "
            "beside the run folders; give another one in a column name"
        )
    if "subject" in cells:
        try:
            read_photos(cells["subject"], "subject")
        except UserError as error:
            problems.append(str(error))
    folder = out / name
    own = {COLUMNS.get(c, c): [cell] for c, cell in cells.items() if c != "name"}
    # Whatever is missing has been told.
    stand_in = {"data.subject": ["folder"], "data.class_name": ["noun"]}
    settings = {**stand_in, **shared, **own}
    overrides = [f"--{key}={text}" for key, texts in settings.items() for text in texts]
    config = None
    try:
        config = load_config(source, [*overrides, f"--output.dir={folder}"], preset)
    except ConfigError as error:
        problems += error.problems
    if config is None or problems:
        raise ConfigError(problems, f"line {line}")
    steps = config.train.steps
    # Of a run that is there, the number of steps may have been raised in the config file.
    overrides += [] if steps == "auto" else [f"--train.steps={steps}"]
    return SubjectRun(line, name, folder, tuple(overrides), config, _is_done(config, folder))


def _name(cells: dict[str, str]) -> str:
    """Name of the run folder; empty where the line does not give one."""
    if "name" in cells or "subject" not in cells:
        return cells.get("name", "")
    last = Path(cells["subject"]).expanduser().resolve().name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.")


def _is_done(config: DreamboothConfig, folder: Path) -> bool:
    """Whether a run folder holds the finished run.

    Raises:
        UserError: when it holds something else than a run with these settings.
    """
    saved = folder / RUN_CONFIG
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give another name")
    if not saved.is_file():
        # What the writer of the config left behind when killed is no content.
        files = folder.iterdir() if folder.is_dir() else ()
        if any(not path.name.startswith(f".{RUN_CONFIG}.") for path in files):
            raise UserError(f"{folder}: holds other files and no run; give another name")
        return False
    before = validate(DreamboothConfig, read_toml(saved), str(saved))
    changed = [
        f"{key.name} = {quote(get_key(config, key.name))}: the run in {folder} was started with "
        f"{quote(get_key(before, key.name))}; change it back, or give another name or --out"
        for key in list_keys(DreamboothConfig)
        if not key.resume and key.name != "output.dir"
        if get_key(config, key.name) != get_key(before, key.name)
    ]
    if changed:
        raise ConfigError(changed, str(saved))
    events = read_events(folder / EVENTS)
    steps = config.train.steps
    longer = steps != "auto" and before.train.steps != "auto" and steps > before.train.steps
    finished = bool(events) and events[-1]["event"] == "done" and (folder / ADAPTER).is_file()
    return finished and not longer


def _same_names(lines: Sequence[tuple[int, dict[str, str]]]) -> list[str]:
    problems: list[str] = []
    names: dict[str, int] = {}
    for line, cells in lines:
        # Some file systems do not tell capitals from small letters.
        first = names.setdefault(_name(cells).lower(), line)
        if first != line and _name(cells):
            problems.append(
                f"line {line}: name {quote(_name(cells))}: line {first} has it too; tell them "
                "apart in a column name"
            )
    return problems


def _same_uploads(runs: Sequence[SubjectRun]) -> list[str]:
    problems: list[str] = []
    uploads: dict[str, int] = {}
    for run in runs:
        target = run.config.output.push_to_hub
        first = run.line if target is None else uploads.setdefault(target, run.line)
        if first != run.line:
            problems.append(
                f"line {run.line}: output.push_to_hub = {quote(target)}: line {first} has it too"
            )
    return problems
