"""Training runs: a queue that survives restarts, one ``nora-dreambooth`` process at a time.

No job queue that could be had fits: huey, APScheduler and rq run functions, and none of them
reorders, stops and resumes a child process without a second daemon; so the queue is the table
``jobs``, and one thread works on it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from nora_diffusion.config import DreamboothConfig, UserError, save_config
from webui import runner
from webui.database import Sessions
from webui.dispatcher import Dispatcher, State, queued
from webui.job_message import message_of
from webui.models import Job, Subject
from webui.paths import DataFolder, new_id
from webui.recipe import Photos, make_recipe
from webui.subject_files import SubjectFiles

RESUMABLE = ("stopped", "interrupted", "failed")


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
        losses: step and loss, for a plot.
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
    losses: tuple[tuple[int, float], ...] = ()


class Jobs:
    """The queue and the one process that works on it; every method takes whose job it is."""

    def __init__(
        self,
        folder: DataFolder,
        sessions: Sessions,
        *,
        before_start: Callable[[], object] = lambda: None,
        on_done: Callable[[str], object] = lambda job: None,
    ) -> None:
        """Open the queue; nothing runs until ``start``.

        Args:
            folder: the data folder.
            sessions: its database.
            before_start: called before a process is started, to free memory.
            on_done: called with the id of a run that is finished.
        """
        self.folder = folder
        self.sessions = sessions
        self._dispatcher = Dispatcher(folder, sessions, before_start, on_done)

    def start(self) -> None:
        """Mark what a server left running as interrupted, and begin to work on the queue.

        A run that outlived its server is told to stop first, and the queue waits for it. That no
        other server works on the same data folder is ``serve``'s to see to.
        """
        self._dispatcher.start()

    def close(self) -> None:
        """Stop the run at hand, saving it, and end the thread."""
        self._dispatcher.close()

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
        id = new_id()
        config, settings = self._recipe(owner, subject_id, base, overrides, preset, id)
        with self.sessions() as session:
            name = session.get_one(Subject, subject_id).name
        run = self.folder.of("runs", id)
        run.mkdir()
        save_config(settings, run)
        with self._dispatcher.lock, self.sessions.begin() as session:
            session.add(
                Job(
                    id=id,
                    owner=owner,
                    subject_id=subject_id,
                    name=name,
                    base=settings.model.base,
                    config=config,
                    preset=preset,
                    overrides=dict(overrides),
                    steps=settings.train.total_steps,
                    state="queued",
                    position=_last(session),
                )
            )
        self._dispatcher.wake()
        return id

    def settle(
        self,
        owner: str,
        subject_id: str,
        base: str,
        overrides: Mapping[str, Any],
        preset: str | None = None,
    ) -> DreamboothConfig:
        """The settings that ``submit`` would queue a run with; arguments and errors as there."""
        return self._recipe(owner, subject_id, base, overrides, preset, new_id())[1]

    def stop(self, owner: str, id: str) -> None:
        """Let a run save and stop; a queued one leaves the queue. Both can be resumed.

        Raises:
            UserError: when it is neither running nor queued, or not this owner's.
        """
        with self._dispatcher.lock, self.sessions.begin() as session:
            job = _find(session, owner, id)
            if job.state == "queued":
                job.state = "stopped"
            elif job.state == "running":
                job.state = "stopping"
                process = runner.find_process(job.pid, job.pid_started)
                if process is not None:
                    runner.ask_to_stop(process.pid)
            elif job.state != "stopping":
                raise UserError(f"this run is {job.state}; only a running or queued one can stop")
        self._dispatcher.wake()

    def resume(self, owner: str, id: str) -> None:
        """Queue a run again; it goes on from its newest checkpoint.

        Raises:
            UserError: when it cannot be resumed, or is not this owner's.
        """
        with self._dispatcher.lock, self.sessions.begin() as session:
            job = _find(session, owner, id)
            if job.state not in RESUMABLE:
                raise UserError(f"this run is {job.state}; there is nothing to resume")
            self._photos(session, owner, job.subject_id)
            job.state, job.message, job.position = "queued", None, _last(session)
        self._dispatcher.wake()

    def cancel(self, owner: str, id: str) -> None:
        """Take a run out of the queue: gone if it never began, else as it was before.

        Raises:
            UserError: when it is not queued, or not this owner's.
        """
        with self._dispatcher.lock, self.sessions.begin() as session:
            job = _find(session, owner, id)
            if job.state != "queued":
                raise UserError(f"this run is {job.state}; only a queued one can be cancelled")
            if job.started_at is not None:
                job.state = "stopped"
                return
            session.delete(job)
        shutil.rmtree(self.folder.of("runs", id), ignore_errors=True)

    def move(self, owner: str, id: str, by: Literal[-1, 1]) -> None:
        """Let a queued run change places with the owner's one before (-1) or after (1) it.

        Raises:
            UserError: when it is not queued, or not this owner's.
        """
        with self._dispatcher.lock, self.sessions.begin() as session:
            job = _find(session, owner, id)
            if job.state != "queued":
                raise UserError(f"this run is {job.state}; only queued ones have an order")
            own = [one for one in queued(session) if one.owner == owner]
            place = [one.id for one in own].index(id) + by
            if 0 <= place < len(own):
                job.position, own[place].position = own[place].position, job.position

    def status(self, owner: str, id: str) -> JobView:
        """One job, with its newest progress.

        Raises:
            UserError: when this owner has none of that id.
        """
        with self.sessions() as session:
            return self._view(session, _find(session, owner, id))

    def all(self, owner: str) -> list[JobView]:
        """Running first, then the queue in its order, then the others, newest first."""
        with self.sessions() as session:
            jobs = session.scalars(select(Job).where(Job.owner == owner)).all()
            return [self._view(session, job) for job in sorted(jobs, key=_rank)]

    def log(self, owner: str, id: str) -> str:
        """The end of what a run has printed.

        Raises:
            UserError: when this owner has none of that id.
        """
        with self.sessions() as session:
            _find(session, owner, id)
        return runner.read_log(self.folder.of("logs", id, ".log"))

    def _recipe(
        self,
        owner: str,
        subject_id: str,
        base: str,
        overrides: Mapping[str, Any],
        preset: str | None,
        id: str,
    ) -> tuple[str, DreamboothConfig]:
        with self.sessions() as session:
            photos = self._photos(session, owner, subject_id)
        run = self.folder.of("runs", id)
        return make_recipe(base, photos, overrides, preset, run, local_bases=owner == "")

    def _photos(self, session: Session, owner: str, subject_id: str | None) -> Photos:
        subject = None if subject_id is None else session.get(Subject, subject_id)
        if subject is None or subject.owner != owner or subject.deleted_at or subject.draft:
            raise UserError("there is no such subject; upload its photos in the tab Subject")
        folder = SubjectFiles(self.folder).photos(subject.id)
        return Photos(folder, len(subject.photos), subject.class_name, subject.trigger)

    def _view(self, session: Session, job: Job) -> JobView:
        live = job.state in ("running", "stopping")
        progress = self._dispatcher.progress.of(job.id, live=live)
        subject = None if job.subject_id is None else session.get(Subject, job.subject_id)
        state: Any = job.state
        eta = None
        if state == "running" and progress.eta_s is not None:
            eta = max(0.0, progress.eta_s - (time.time() - progress.eta_time))
        return JobView(
            id=job.id,
            owner=job.owner,
            subject_id=job.subject_id,
            name=job.name,
            base=job.base,
            state=state,
            step=progress.step,
            steps=job.steps,
            loss=progress.loss,
            eta_s=eta,
            message=message_of(session, job, progress),
            created_at=job.created_at,
            sheet=progress.image,
            resumable=state in RESUMABLE and subject is not None and subject.deleted_at is None,
            losses=tuple(progress.losses),
        )


def _find(session: Session, owner: str, id: str) -> Job:
    job = session.get(Job, id)
    if job is None or job.owner != owner:
        raise UserError("there is no such run")
    return job


def _last(session: Session) -> float:
    """The place behind all others."""
    return (session.scalar(select(func.max(Job.position))) or 0.0) + 1.0


def _rank(job: Job) -> tuple[int, float]:
    if job.state in ("running", "stopping"):
        return 0, 0.0
    if job.state == "queued":
        return 1, job.position
    return 2, -(job.ended_at or job.created_at)
