"""Whether a folder can take a run or other results, and making that of a run."""

import shlex
from pathlib import Path

from nora_diffusion.disk import check_writable, is_temporary, remove_temporaries
from nora_diffusion.events import read_events
from nora_diffusion.run_config import RUN_CONFIG
from nora_diffusion.settings import UserError, quote

EVENTS = "events.jsonl"
CHECKPOINTS = "checkpoints"
RESULTS = "results.json"  # of what ends with scores


def check_free(
    folder: Path, given_as: str = "output.dir =", command: str = "nora-dreambooth"
) -> None:
    """Refuse a folder that holds something.

    A run that ended in an error before its first checkpoint is nothing: the corrected command may
    take its place.

    Args:
        folder: where the run shall go; it need not exist.
        given_as: what stands before it in messages.
        command: what continues a run that is there.

    Raises:
        UserError: saying what to do.
    """
    shown = f"{given_as} {quote(str(folder))}"
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{shown}: is a file; give a folder")
        # What was being written when a start was killed is no content.
        if not folder.exists() or all(map(is_temporary, folder.iterdir())):
            return
        if not (folder / RUN_CONFIG).is_file():
            raise UserError(f"{shown}: holds other files and no run; give an empty or new folder")
        if _failed_at_the_start(folder):
            return
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be looked into ({error.strerror}); give another --output.dir"
        ) from None
    raise UserError(
        f"{shown}: already holds a run; continue it with "
        f"{command} --resume {shlex.quote(str(folder))}, or give another --output.dir"
    )


def check_out(out: str | Path, folder: Path | None = None) -> None:
    """Refuse, before any work is done, a place for results that cannot be written.

    Args:
        out: the value of ``--out``, for messages.
        folder: where files will go; None: ``out`` itself. Nothing is made.

    Raises:
        UserError: naming ``--out`` and what stands in the way.
    """
    out = Path(out).expanduser()
    try:
        check_writable(out if folder is None else folder)
    except NotADirectoryError as error:
        what = "is a file" if Path(error.filename) == out else f"{error.filename} is a file"
        raise UserError(f"--out {out}: {what}; give another place") from None
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); give another place"
        ) from None


def open_folder(folder: Path, resume: bool, command: str = "nora-dreambooth") -> None:
    """Make the folder of a new run, or tidy that of one that goes on.

    Args:
        folder: of the run.
        resume: whether it goes on.
        command: what continues a run that is there.

    Raises:
        UserError: when the folder cannot take a new run, or cannot be made.
    """
    if not resume:
        check_free(folder, command=command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output.dir = {quote(str(folder))}: cannot be made ({error.strerror}); give another "
            "--output.dir"
        ) from None
    remove_temporaries(folder)


def _failed_at_the_start(folder: Path) -> bool:
    checkpoints = folder / CHECKPOINTS
    if checkpoints.exists() and any(checkpoints.iterdir()):
        return False
    events = read_events(folder / EVENTS)
    return bool(events) and events[-1]["event"] == "error"
