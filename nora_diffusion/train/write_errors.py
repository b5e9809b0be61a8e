"""What goes wrong in a run: told in its event log; a failed write with how to go on."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nora_diffusion.config import RUN_CONFIG, UserError
from nora_diffusion.settings import quote
from nora_diffusion.train.common import TrainingInterrupted
from nora_diffusion.train.report import Report

_FULL = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "have the limit on the size of files raised (ulimit -f)",
}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


COMMAND = "nora-dreambooth"


def explain(error: Exception, run: Path, command: str = COMMAND) -> UserError | None:
    """What to do about an error of writing a run's files; None for any other error.

    Args:
        error: as raised.
        run: the run folder.
        command: what continues the run.
    """
    if not isinstance(error, OSError):
        return None
    path = Path(error.filename or run)
    if error.errno in _FULL:
        cure = _FULL[error.errno]
    elif error.errno in _CLOSED and path.absolute().is_relative_to(run.absolute()):
        cure = "make the folder writable, or move the run to one that is"
    else:
        return None
    again = "give the same command again"
    if (run / RUN_CONFIG).is_file():
        again = f"go on with: {command} --resume {shlex.quote(str(run))}"
    return UserError(
        f"output.dir = {quote(str(run))}: {path} cannot be written ({error.strerror}). "
        f"What was saved before is whole: {cure}, then {again}"
    )


@contextmanager
def explained(run: Path, command: str = COMMAND) -> Iterator[None]:
    """Raise what ``explain`` says of errors in a ``with`` block, or of a function so decorated."""
    try:
        yield
    except OSError as error:
        told = explain(error, run, command)
        if told is None:
            raise
        raise told from error


@contextmanager
def failures_reported(report: Report, command: str = COMMAND) -> Iterator[None]:
    """Write what ends a ``with`` block into the run's event log.

    Args:
        report: of the run.
        command: what continues it.
    """
    try:
        yield
    except TrainingInterrupted:  # has been reported, with its step
        raise
    except KeyboardInterrupt:
        report.event("stopped", message="stopped outside the training steps")
        raise
    except Exception as error:
        told = explain(error, report.run, command) or error
        with suppress(OSError):  # the disk may be what has failed
            report.event("error", message=str(told) or type(told).__name__)
        raise
