"""What a run saves to be continued from, and whether it can be continued as asked."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.schema import get_key, list_keys
from nora_diffusion.settings import quote
from nora_diffusion.train import adapters
from nora_diffusion.train.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    newest_path,
    save_checkpoint,
)
from nora_diffusion.train.processes import Processes
from nora_diffusion.train.session import Session


def save(session: Session) -> None:
    """Save a checkpoint of all that the next step depends on, and say so."""
    of_optimizer, numbers = session.update.state()  # of all processes, with ZeRO
    if not session.processes.first:
        return
    tensors = {
        "trained": {name: p.detach() for name, p in session.parameters.items()},
        "optimizer": of_optimizer,
        "outer": adapters.fitted_factors(session.models),
        "ema": {} if session.ema is None else session.ema.average,
    }
    state = {
        "settings": _fixed_settings(session.cfg),
        "data": session.inputs.digest,
        "photos": session.inputs.photo_table(),
        "base_hash": session.base_hash,
        "scaler": session.scaler.state_dict(),
        "first_losses": session.guard.first,
        "optimizer": numbers,
        "processes": session.processes.count,
    }
    keep = session.cfg.train.checkpoints_keep
    used = {stem: named for stem, named in tensors.items() if named}
    path = save_checkpoint(session.run, session.step, state, used, keep)
    session.report.event("checkpoint", session.step, message=str(path.relative_to(session.run)))


def usable_checkpoint(
    cfg: DreamboothConfig, folder: Path, processes: Processes
) -> Checkpoint | None:
    """The newest checkpoint of a run, or None.

    Raises:
        UserError: when it was trained with other settings, by another number of processes, or
            for more steps than the run shall have.
    """
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        _check_settings(cfg, checkpoint, processes)
        _check_steps(cfg.train.total_steps, checkpoint.step)
    return checkpoint


def _check_steps(steps: int, done: int) -> None:
    if steps < done:  # the config would say what is not true of the adapter
        raise UserError(
            f"train.steps = {steps}: this run is at step {done} already, and steps cannot be taken "
            f"back; give {done} or more, or start a new run in another output.dir"
        )


def resume_command(folder: Path, processes: Processes) -> str:
    """The command that goes on with a run, in words where a launcher must start it."""
    command = f"nora-dreambooth --resume {shlex.quote(str(folder))}"
    if processes.count == 1:
        return command
    return f"{command} under accelerate launch, with {processes.count} processes as before"


def how_to_go_on(folder: Path, processes: Processes) -> str:
    """A sentence on the newest checkpoint of a run."""
    newest = newest_path(folder)
    if newest is None:
        return "no checkpoint had been saved"
    return f"the newest checkpoint is {newest}; continue with: {resume_command(folder, processes)}"


def _check_settings(cfg: DreamboothConfig, checkpoint: Checkpoint, processes: Processes) -> None:
    count = checkpoint.state.get("processes", 1)
    if count != processes.count:
        raise UserError(
            f"{checkpoint.path} was trained by {count} process{'es' if count > 1 else ''}, each "
            f"with a batch of its own, and these are {processes.count}; continue it with "
            f"{resume_command(checkpoint.path.parent.parent, Processes(count=count))}"
        )
    then, now = checkpoint.state["settings"], _fixed_settings(cfg)
    changed = [name for name in now if then.get(name) != now[name]]
    if changed:
        listed = "".join(f"\n  {n} = {quote(now[n])}, was {quote(then.get(n))}" for n in changed)
        raise UserError(
            f"{checkpoint.path} was trained with other settings, so the run cannot be continued "
            f"with these:{listed}\nchange them back, or start a new run in another output.dir"
        )


def _fixed_settings(cfg: DreamboothConfig) -> dict[str, Any]:
    """Settings that finished steps depend on, as JSON values."""
    fixed = {
        key.name: get_key(cfg, key.name)
        for key in list_keys(DreamboothConfig)
        if not key.resume and key.name != "output.dir"
    }
    # Of subjects all but their places, as of data.subject.
    return json.loads(json.dumps(fixed, default=lambda one: one.model_dump(exclude={"path"})))
