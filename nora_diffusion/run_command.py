"""A training command: CONFIG, overrides, ``--dry-run``, ``--resume``; and what a stop tells.

For the schema of any command; what a dry run prints is the command's own.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from nora_diffusion import __version__
from nora_diffusion.disk import is_temporary
from nora_diffusion.presets import Choice, find_preset
from nora_diffusion.run_config import RUN_CONFIG, Config, load_config, load_run, shipped_configs
from nora_diffusion.run_folder import CHECKPOINTS, RESULTS, check_free
from nora_diffusion.schema import RunConfig, get_key, list_keys
from nora_diffusion.settings import ConfigError, part_overrides, quote


@dataclass(frozen=True)
class Given(Generic[Config]):
    """What a command line asks for.

    Attributes:
        config: the resolved settings.
        resume: whether they continue a run.
        dry_run: whether to print them and stop.
        preset: its name, or None.
    """

    config: Config
    resume: bool
    dry_run: bool
    preset: str | None


def read_command_line(
    schema: type[Config],
    argv: Sequence[str],
    description: str,
    presets: Mapping[str, Sequence[Choice]] | None = None,
) -> Given[Config]:
    """Parse ``CONFIG [--preset P] [--section.key value ...] [--dry-run] [--resume DIR]``.

    Args:
        schema: of the command.
        argv: what stands after it.
        description: one sentence for ``--help``.
        presets: those the command has; without any there is no ``--preset``.

    Raises:
        ConfigError: naming every problem at once.
        UserError: when the run folder cannot take the run.
    """
    argv, overrides = part_overrides(argv)
    args, unknown = _parser(schema, description, presets or {}).parse_known_args(argv)
    overrides += unknown
    preset = args.preset if presets else None
    choices = () if preset is None else find_preset(preset)
    config, resume = _load(schema, args.config, args.resume, overrides, choices)
    return Given(config, resume, args.dry_run, preset)


def how_to_resume(config: RunConfig, folder: str) -> str:
    """What to type after a run in ``folder`` was stopped."""
    path = Path(folder).expanduser()
    if not (path / RUN_CONFIG).is_file():
        return "nothing had been written yet"
    command = f"{config.command} --resume {shlex.quote(folder)}"
    if any(not is_temporary(found) for found in (path / CHECKPOINTS).glob("*-*")):
        return f"continue from its newest checkpoint with: {command}"
    if (path / RESULTS).is_file():  # of many trainings, each kept when it is done
        return f"what is finished is kept; go on with: {command}"
    return f"no checkpoint had been saved; start again with: {command}"


def settle_and_run(
    settle: Callable[[], tuple[Config, bool] | None], run: Callable[[Config, bool], object]
) -> int:
    """Carry out a training command; returns its exit code.

    Args:
        settle: reads the command line: the settings, and whether they continue a run; None after
            a dry run. Under a launcher the first process alone does, and hands the others the rest.
        run: trains, given both.

    Raises:
        KeyboardInterrupt: saying how to go on.
    """
    settled = _settle_for_all(settle) if "LOCAL_RANK" in os.environ else settle()
    if settled is None:
        return 0
    config, resume = settled
    try:
        run(config, resume)
    except KeyboardInterrupt as stop:
        cure = how_to_resume(config, get_key(config, "output.dir"))
        raise KeyboardInterrupt(str(stop) or f"stopped; {cure}") from None
    return 0


def _settle_for_all(
    settle: Callable[[], tuple[Config, bool] | None],
) -> tuple[Config, bool] | None:
    from nora_diffusion.train.processes import join

    processes = join()
    with processes.together(lambda: "no run had been started"):
        return processes.from_first(settle)


def _parser(
    schema: type[RunConfig], description: str, presets: Mapping[str, Sequence[Choice]]
) -> argparse.ArgumentParser:
    usage = "%(prog)s CONFIG [--section.key value ...] [--dry-run] [--resume DIR]"
    parser = argparse.ArgumentParser(
        prog=schema.command,
        usage=usage.replace("CONFIG ", "CONFIG [--preset P] ") if presets else usage,
        description=description,
        epilog='Lists: repeat the flag, or give a TOML array. "none" unsets a key that allows it.',
        allow_abbrev=False,
    )
    names = ", ".join(shipped_configs(schema.command))
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help=f"a TOML file, or a shipped config: {names}"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and stop"
    )
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="continue the run in DIR with its own settings; start one there if there is none",
    )
    if presets:
        parser.add_argument(
            "--preset",
            metavar="P",
            help=f"settings for a card of that size, listed below: {', '.join(presets)}; they go "
            "before the config, and --section.key goes before them",
        )
    parser.add_argument("--version", action="version", version=__version__)
    groups: dict[type, Any] = {}
    for key in list_keys(schema):
        if key.section not in groups:
            title = f"[{key.name.split('.')[0]}]"
            groups[key.section] = parser.add_argument_group(title, key.section.__doc__)
        default = "required" if key.required else f"default {quote(key.default)}"
        text = f"{key.help} ({key.allowed}; {default})"
        groups[key.section].add_argument(f"--{key.name}", metavar="V", help=text.replace("%", "%%"))
    for name, choices in presets.items():
        parser.add_argument_group(f"--preset {name}", " ".join(map(str, choices)))
    return parser


def _load(
    schema: type[Config],
    source: str | None,
    resume: str | None,
    overrides: list[str],
    choices: Sequence[Choice],
) -> tuple[Config, bool]:
    """The config to train with, and whether it continues a run."""
    own = None if resume is None else Path(resume).expanduser() / RUN_CONFIG
    if own is not None and own.is_file():
        config = load_run(schema, own.parent, overrides, choices)
        if source is not None:
            print(f"resuming with the run's own settings ({own}), not {source}", file=sys.stderr)
        return config, True
    if source is None and own is not None:
        what = "no such folder" if not own.parent.exists() else f"holds no {RUN_CONFIG}"
        what = "a file, where a run folder is asked for" if own.parent.is_file() else what
        raise ConfigError(
            [f"--resume {quote(str(resume))}: {what}; give the folder of a run (its output.dir)"],
            "the command line",
        )
    if source is None:
        names = ", ".join(shipped_configs(schema.command))
        raise ConfigError(
            [f"CONFIG: missing; give a TOML file or a shipped config: {names}"],
            "the command line",
        )
    if resume is not None:
        overrides = [*overrides, f"output.dir={resume}"]
    config = load_config(schema, source, overrides, choices)
    given_as = "output.dir =" if resume is None else "--resume"
    folder = Path(get_key(config, "output.dir")).expanduser()
    check_free(folder, given_as, schema.command)
    return config, False
