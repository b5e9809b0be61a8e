"""Where a run stands, in a sentence."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from webui.models import Job
from webui.progress import Progress


def message_of(session: Session, job: Job, progress: Progress) -> str:
    """What the reader is told of a run; of one that failed what to change."""
    back = progress.checkpoint
    onward = f"Resume goes on from step {back}." if back else "Resume begins it again."
    match job.state:
        case "queued":
            before = _ahead(session, job)
            return (
                f"Waits for {before} other run{'s' if before > 1 else ''}." if before else "Next."
            )
        case "running":
            return _phase(job, progress)
        case "stopping":
            return "Finishes its step and saves, then it stops."
        case "stopped":
            return f"Stopped after step {progress.step}. {onward}"
        case "interrupted":
            return f"The app ended while this run was at work. {onward}"
        case "done":
            return "Finished; the adapter is in the tab Adapters."
    return job.message or "The run failed."


def _ahead(session: Session, job: Job) -> int:
    """Runs that are worked on before a queued one."""
    working = Job.state.in_(("running", "stopping"))
    before = (Job.state == "queued") & (Job.position < job.position)
    return session.scalar(select(func.count()).where(working | before)) or 0


def _phase(job: Job, progress: Progress) -> str:
    last = progress.last
    if last is None or last["time"] < (job.started_at or 0.0):
        return "Starts: loading the base model takes a while."
    if last["event"] in ("error", "stopped", "done"):
        return "Ends."
    if last["event"] == "data":
        return "Encodes the photos and prepares the adapter."
    if job.steps is not None and progress.step >= job.steps:
        return "Training is done; draws the samples."
    return "Trains."
