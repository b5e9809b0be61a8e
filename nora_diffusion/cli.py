"""The commands ``nora-dreambooth`` and ``nora``; whatever is heavy is imported inside them."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nora_diffusion import __version__, commands
from nora_diffusion.config import (
    RUN_CONFIG,
    ConfigError,
    DreamboothConfig,
    UserError,
    load_config,
    load_run,
    shipped_configs,
)
from nora_diffusion.presets import PRESETS, find_preset
from nora_diffusion.run_folder import check_free
from nora_diffusion.schema import get_key, list_keys
from nora_diffusion.settings import part_overrides, quote, to_toml

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
MEMORY_CURES = (
    "The GPU's memory is full. Try dtype bf16 and a smaller resolution; in training also "
    "--train.batch_size 1 and --train.gradient_checkpointing true."
)


def main_dreambooth(argv: Sequence[str] | None = None) -> int:
    """``nora-dreambooth CONFIG [--preset P] [--section.key value ...] [--resume DIR]``."""
    return _guard("nora-dreambooth", _dreambooth, sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> int:
    """``nora COMMAND ...``: what is done with a finished adapter."""
    return _guard("nora", commands.run, sys.argv[1:] if argv is None else argv)


def _guard(prog: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; what the user can act on ends in one message, not in a stack trace."""
    warnings.formatwarning = _as_one_line
    try:
        with _terminable():
            return command(argv)
    except KeyboardInterrupt as stop:
        print(f"\n{prog}: {str(stop) or 'stopped'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader went away, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        if type(error).__name__ == "OutOfMemoryError":
            print(MEMORY_CURES, file=sys.stderr)
        return code


def _as_one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as users read it: without the line of code that raised it."""
    return f"warning: {message}\n"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does; signals can be handled in the main thread only."""
    handled = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handled:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_code(error: Exception) -> int | None:
    """The exit code for an error that needs no stack trace, else None."""

    def raised(module: str, name: str) -> bool:
        # Looked up only where it can have been raised: these modules stand beside torch.
        return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))

    if isinstance(error, UserError | OSError):
        return USER_ERROR
    if raised("nora_diffusion.adapter.header", "AdapterFileError"):
        return USER_ERROR
    return FAILED if raised("torch", "OutOfMemoryError") else None


def _dreambooth(argv: Sequence[str]) -> int:
    settled = _settle_for_all(argv) if "LOCAL_RANK" in os.environ else _settle(argv)
    if settled is None:  # it was a dry run
        return 0
    config, resume = settled

    from nora_diffusion.train import dreambooth

    try:
        dreambooth.run(config, resume=resume)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or f"stopped; {_how_to_resume(config)}") from None
    return 0


def _settle_for_all(argv: Sequence[str]) -> tuple[DreamboothConfig, bool] | None:
    """Under a launcher: the first process reads the command line, the others are handed it."""
    from nora_diffusion.train.processes import join

    processes = join()
    with processes.together(lambda: "no run had been started"):
        return processes.from_first(lambda: _settle(argv))


def _settle(argv: Sequence[str]) -> tuple[DreamboothConfig, bool] | None:
    """The config to train with, and whether it continues a run; None after a dry run."""
    argv, overrides = part_overrides(argv)
    args, unknown = _dreambooth_parser().parse_known_args(argv)
    overrides += unknown
    config, resume = _load(args.config, args.resume, overrides, args.preset)
    if args.dry_run:
        _dry_run(config, args.preset)
        return None
    return config, resume


def _dreambooth_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nora-dreambooth",
        usage="%(prog)s CONFIG [--preset P] [--section.key value ...] [--dry-run] [--resume DIR]",
        description="Teach a diffusion model your subject from 1 to 20 photos.",
        epilog='Lists: repeat the flag, or give a TOML array. "none" unsets a key that allows it.',
        allow_abbrev=False,
    )
    names = ", ".join(shipped_configs())
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
    parser.add_argument(
        "--preset",
        metavar="P",
        help=f"settings for a card of that size, listed below: {', '.join(PRESETS)}; they go "
        "before the config, and --section.key goes before them",
    )
    parser.add_argument("--version", action="version", version=__version__)
    groups: dict[type, Any] = {}
    for key in list_keys(DreamboothConfig):
        if key.section not in groups:
            title = f"[{key.name.split('.')[0]}]"
            groups[key.section] = parser.add_argument_group(title, key.section.__doc__)
        default = "required" if key.required else f"default {quote(key.default)}"
        text = f"{key.help} ({key.allowed}; {default})"
        groups[key.section].add_argument(f"--{key.name}", metavar="V", help=text.replace("%", "%%"))
    for name, choices in PRESETS.items():
        parser.add_argument_group(f"--preset {name}", " ".join(map(str, choices)))
    return parser


def _load(
    source: str | None, resume: str | None, overrides: list[str], preset: str | None
) -> tuple[DreamboothConfig, bool]:
    """The config to train with, and whether it continues a run."""
    own = None if resume is None else Path(resume).expanduser() / RUN_CONFIG
    if own is not None and own.is_file():
        config = load_run(own.parent, overrides, preset)
        if source is not None:
            print(f"resuming with the run's own settings ({own}), not {source}", file=sys.stderr)
        return config, True
    if source is None:
        names = ", ".join(shipped_configs())
        where = "" if resume is None else f" ({resume} holds no {RUN_CONFIG} to resume from)"
        raise ConfigError(
            [f"CONFIG: missing{where}; give a TOML file or a shipped config: {names}"],
            "the command line",
        )
    if resume is not None:
        overrides = [*overrides, f"output.dir={resume}"]
    config = load_config(source, overrides, preset)
    given_as = "output.dir =" if resume is None else "--resume"
    check_free(Path(config.output.dir).expanduser(), given_as)
    return config, False


def _dry_run(config: DreamboothConfig, preset: str | None) -> None:
    """Print the config as TOML, and as comments what the run would find."""
    from nora_diffusion.train import photos
    from nora_diffusion.train.launcher import check_launcher
    from nora_diffusion.train.prepare import check_extras
    from nora_diffusion.train.processes import join
    from nora_diffusion.train.steps import resolve_steps

    check_extras(config)
    processes = join()
    check_launcher(config, processes)
    config, told = resolve_steps(config, processes.count)
    print(to_toml(config))
    lines = [] if preset is None else _preset_lines(config, preset)
    lines += [] if told is None else [told]
    found = photos.read_subjects(config)
    sizes, memory = _of_base(config, found, processes.shards)
    reported = photos.report_lines(config, found, sizes)
    lines += [line for text in (*reported, *memory) for line in text.splitlines()]
    print("\n".join(f"# {line}" for line in lines))


def _preset_lines(config: DreamboothConfig, preset: str) -> list[str]:
    """A line for each choice of a preset, with what the command line made of it."""
    lines = [f"--preset {preset}:"]
    for choice in find_preset(preset):
        now = get_key(config, choice.key)
        changed = "" if now == choice.value else f" Here {quote(now)}, from the command line."
        lines.append(f"  {choice}{changed}")
    return lines


def _of_base(
    config: DreamboothConfig, found: Sequence[Any], shards: int
) -> tuple[tuple[int, int] | None, list[str]]:
    """Resolution and multiple of the base, and the memory a run will need."""
    from nora_diffusion.train.memory import picture_sizes, plan_memory
    from nora_diffusion.train.photos import all_photos, count_pictures

    photos = [photo.size for photo in all_photos(found)]
    try:
        sizes = picture_sizes(config)
        pictures = count_pictures(config, found)
        return sizes, plan_memory(config, pictures, photos, shards).lines()
    except UserError as error:  # configs that cannot be had now may be there at the run
        return None, [f"predicted memory: unknown, because of {error}"]


def _how_to_resume(config: DreamboothConfig) -> str:
    folder = Path(config.output.dir).expanduser()
    if not (folder / RUN_CONFIG).is_file():
        return "nothing had been written yet"
    command = f"nora-dreambooth --resume {shlex.quote(config.output.dir)}"
    if any((folder / "checkpoints").glob("step-*")):
        return f"continue from its newest checkpoint with: {command}"
    return f"no checkpoint had been saved; start again with: {command}"
