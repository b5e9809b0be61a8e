"""Training runs: a queue that survives restarts, one ``nora-dreambooth`` process at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from webui.database import Sessions
from webui.paths import DataFolder

State = Literal["queued", "running", "stopping", "stopped", "interrupted", "failed", "done"]


@dataclass(frozen=True)
class JobView:
    """A job as the tabs and the API show it.

    Attributes:
        name: of the subject.
        step: optimiser steps completed.
        steps: those it will have; None while not known.
        loss: mean loss of the last logged steps.
        eta_s: seconds to the end, estimated.
        message: a sentence for the reader; of a failed run what to change.
        sheet: newest picture of samples, or None.
        resumable: whether ``resume`` would go on with it.
    """

    id: str
    owner: str
    subject_id: str | None
    name: str
    base: str
    state: State
    step: int
    steps: int | None
    loss: float | None
    eta_s: float | None
    message: str
    created_at: float
    sheet: Path | None
    resumable: bool


class Jobs:
    """The queue and the one process that works on it; every method takes whose job it is."""

    def __init__(self, folder: DataFolder, sessions: Sessions) -> None:
        self.folder = folder
        self.sessions = sessions

    def start(self) -> None:
        """Mark what a server left running as interrupted, and begin to work on the queue."""

    def close(self) -> None:
        """Stop the run at hand, saving it, and end the thread."""

    def submit(
        self,
        owner: str,
        subject_id: str,
        base: str,
        overrides: Mapping[str, Any],
        preset: str | None = None,
    ) -> str:
        """Queue a run and return its id.

        Args:
            owner: whose it is.
            subject_id: one of the owner's subjects.
            base: name of a shipped config ("mini", "sd15", ...), or a local path or hub id.
            overrides: ``section.key`` to value, as of ``nora-dreambooth``.
            preset: name of one of ``presets.PRESETS``.

        Raises:
            UserError: naming every setting that cannot be used.
        """
        raise NotImplementedError

    def status(self, owner: str, id: str) -> JobView:
        """One job, with its newest progress.

        Raises:
            UserError: when this owner has none of that id.
        """
        raise NotImplementedError

    def all(self, owner: str) -> list[JobView]:
        """Running first, then the queue in its order, then the others, newest first."""
        raise NotImplementedError
