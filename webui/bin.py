"""What is deleted: kept for some days, then gone for good, with every copy."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import text
from sqlalchemy.orm import Session

from nora_diffusion.config import UserError
from webui.database import Sessions
from webui.models import Adapter, Subject
from webui.paths import DataFolder

Row = TypeVar("Row", Subject, Adapter)

DAY_S = 86_400
DAYS_IN_BIN = 30


def owned(session: Session, table: type[Row], owner: str, id: str, in_bin: bool = False) -> Row:
    """The row of somebody's own thing, in the bin or out of it.

    Raises:
        UserError: when this owner has none of that id there.
    """
    row = session.get(table, id)
    if row is None or row.owner != owner or (row.deleted_at is not None) != in_bin:
        where = "in the bin" if in_bin else "here"
        thing = table.__name__.lower()
        raise UserError(f"there is no such {thing} {where} any more; load the page again")
    return row


def days_left(deleted_at: float, now: float | None = None) -> int:
    """Days until something in the bin is gone, 0 or more."""
    since = (time.time() if now is None else now) - deleted_at
    return max(0, DAYS_IN_BIN - int(since // DAY_S))


def expired_before(now: float | None = None) -> float:
    """What was deleted before this time is over."""
    return (time.time() if now is None else now) - DAYS_IN_BIN * DAY_S


def remove_copies(folder: DataFolder, files: Iterable[Path]) -> None:
    """Remove every copy of some files from ``uploads``: what was sent, and what pages were shown.

    Gradio keeps its copies under names of its own, so they are found by their content.
    """
    wanted: dict[int, set[str]] = {}
    for path in files:
        wanted.setdefault(path.stat().st_size, set()).add(_digest(path))
    for path in folder.part("uploads").rglob("*"):
        digests = wanted.get(path.stat().st_size) if path.is_file() else None
        if digests and _digest(path) in digests:
            path.unlink(missing_ok=True)


def forget_deleted_rows(sessions: Sessions) -> None:
    """Let nothing of deleted rows remain in the database's files.

    ``secure_delete`` has overwritten them in the file itself; the log beside it still has the pages
    as they were.
    """
    with sessions() as session:
        session.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


class DailyRound:
    """Calls functions at the start and then once a day, until it is closed."""

    def __init__(self, *functions: Callable[[], None]) -> None:
        self._functions = functions
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="daily round", daemon=True)

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._over.set()

    def join(self) -> None:
        """Wait until the round at hand is over."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            for function in self._functions:
                try:
                    function()
                except Exception:  # the others, and tomorrow's round, must come all the same
                    logging.getLogger(__name__).exception("the bin could not be emptied")
            if self._over.wait(DAY_S):
                return


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
