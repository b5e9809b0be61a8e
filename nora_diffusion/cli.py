"""The commands ``nora-dreambooth`` and ``nora``; whatever is heavy is imported inside them."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from nora_diffusion import commands
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.cores import spin_briefly
from nora_diffusion.presets import PRESETS, find_preset
from nora_diffusion.run_command import read_command_line, settle_and_run
from nora_diffusion.schema import get_key
from nora_diffusion.settings import quote, to_toml

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
    spin_briefly(os.environ)  # before torch is imported
    # bitsandbytes says at every import that it lacks 4-bit products on the CPU; none is used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
    def run(config: DreamboothConfig, resume: bool) -> None:
        from nora_diffusion.train import dreambooth

        dreambooth.run(config, resume=resume)

    return settle_and_run(partial(_settle, argv), run)


def _settle(argv: Sequence[str]) -> tuple[DreamboothConfig, bool] | None:
    """The config to train with, and whether it continues a run; None after a dry run."""
    about = "Teach a diffusion model your subject from 1 to 20 photos."
    given = read_command_line(DreamboothConfig, argv, about, PRESETS)
    if given.dry_run:
        _dry_run(given.config, given.preset)
        return None
    return given.config, given.resume


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
    from nora_diffusion.train.memory import foresee
    from nora_diffusion.train.photos import all_photos, count_pictures

    photos = [photo.size for photo in all_photos(found)]
    return foresee(config, count_pictures(config, found), photos, shards)
