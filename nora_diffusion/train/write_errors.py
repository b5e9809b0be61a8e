"""Full disks and folders that cannot be written: what has happened, and how to go on."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nora_diffusion.config import RUN_CONFIG, UserError
from nora_diffusion.settings import quote

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
