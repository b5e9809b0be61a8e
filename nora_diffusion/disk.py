"""Writing files: readers see a whole one or none, and an error names the file."""

import errno
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes under a temporary name beside ``path``, sync them, and rename.

    Args:
        path: the file; replaced in one step if it exists. Its folder is made if missing.
        data: what it shall hold.

    Raises:
        OSError: naming ``path``, which is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of a ``with`` block name a file; those of a write itself name none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def check_writable(folder: Path) -> None:
    """Try whether a folder can be made and written, and leave nothing behind.

    Raises:
        OSError: what making or writing it would raise, with the path that stands in the way.
    """
    there = folder
    while True:
        try:
            there.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):  # of the latter the file is further up
            if there == there.parent:  # the working folder has been removed
                raise
            there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file", str(there))
    with naming(there), tempfile.TemporaryFile(dir=there):
        pass


def is_temporary(path: Path) -> bool:
    """Whether a file is one of ``write_atomically``, unfinished or left by a killed process."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left in and below a folder that nobody else writes to."""
    for path in folder.rglob(".*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)
