"""The DreamBooth recipe: from a few photos of a subject to an adapter that can draw it.

Read from top to bottom: prepare (``prepare.py``: load, encode everything once, add the adapter),
loop, save. After Ruiz et al. 2023 (arXiv 2208.12242); a class image is an item with a weight of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nora_diffusion.adapter.switch import switched_off
from nora_diffusion.config import RUN_CONFIG, DreamboothConfig, save_config
from nora_diffusion.families import locate
from nora_diffusion.families.base import Conditioning, Family, resolve_device
from nora_diffusion.run_folder import open_folder
from nora_diffusion.train import adapters, common, resuming
from nora_diffusion.train.checkpoint import newest_path
from nora_diffusion.train.inputs import Batch
from nora_diffusion.train.launcher import check_launcher
from nora_diffusion.train.memory import check_memory, plan_memory
from nora_diffusion.train.outcome import draw_sheet, write_outcome
from nora_diffusion.train.photos import Found, all_photos, count_pictures, read_subjects
from nora_diffusion.train.prepare import check_extras, prepare
from nora_diffusion.train.processes import Processes, join
from nora_diffusion.train.publish import push_to_hub
from nora_diffusion.train.report import Report
from nora_diffusion.train.session import Session
from nora_diffusion.train.steps import resolve_steps
from nora_diffusion.train.trackers import open_trackers
from nora_diffusion.train.write_errors import explained, failures_reported


def run(cfg: DreamboothConfig, *, resume: bool = False) -> Path:
    """Train an adapter as the config says.

    Args:
        cfg: the settings.
        resume: continue the run in ``output.dir`` from its newest checkpoint; the weights come out
            bit-identical to those of a run that was never stopped.

    Returns:
        The run folder, with ``adapter.safetensors``, the LoRA export, model card and samples.

    Raises:
        UserError: on settings, photos or a folder that cannot be used.
        TrainingDiverged: when loss or gradient is not finite, or the loss has exploded.
        TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        ProcessLost: when another process of the run has gone.
    """
    processes = join()
    folder = Path(cfg.output.dir).expanduser()
    with explained(folder), processes.together(partial(resuming.how_to_go_on, folder, processes)):
        _run(cfg, folder, resume, processes)
    return folder


def _run(cfg: DreamboothConfig, folder: Path, resume: bool, processes: Processes) -> None:
    def begin() -> tuple[DreamboothConfig, str | None, list[Found]]:
        check_launcher(cfg, processes)
        resolved, told = resolve_steps(cfg, processes.count)
        check_extras(cfg)
        # Before there is a folder, which would be in the way of the corrected command.
        found = read_subjects(cfg)
        resolve_device(cfg.model.device)
        locate(cfg.model.base)
        open_folder(folder, resume)
        if not resume or not (folder / RUN_CONFIG).is_file():
            save_config(resolved, folder)
        return resolved, told, found

    cfg, told, found = processes.from_first(begin)
    processes.check_same("accelerate launch", processes.strategy)
    report = Report(
        folder,
        total_steps=cfg.train.total_steps,
        log_every=cfg.train.log_every,
        trackers=open_trackers(cfg, folder) if processes.first else (),
        silent=not processes.first,
    )
    how_to_go_on = partial(resuming.how_to_go_on, folder, processes)
    with report, failures_reported(report), processes.losses_named(how_to_go_on):
        if told is not None:
            report.say(told)
        _check_memory(cfg, found, report, processes)
        checkpoint = processes.from_first(
            lambda: resuming.usable_checkpoint(cfg, folder, processes) if resume else None
        )
        session = prepare(cfg, folder, report, checkpoint, processes)
        if processes.first:  # of a resumed run only now: new settings have proved usable
            save_config(cfg, folder)
        train(session)
        write_outcome(session)
        if cfg.output.push_to_hub is not None and processes.first:
            report.say(f"uploaded to {push_to_hub(folder, cfg.output.push_to_hub)}")
        told = f"finished; everything is in {folder}"
        report.say(told)
        report.event("done", session.step, message=told)


def train(session: Session) -> None:
    """The loop: from ``session.step`` to ``train.steps``."""
    cfg, report, processes = session.cfg.train, session.report, session.processes
    steps = cfg.total_steps
    resumed = f", resumed at step {session.step}" if session.step else ""
    report.event("start", session.step, message=f"{steps} steps{resumed}")
    for model in session.models.values():
        model.train()
    report.start_loop(session.step)
    with common.StopSignal(patient=processes.count > 1) as stop:
        while session.step < steps:
            factor = common.lr_factor(session.step, cfg.lr_schedule, cfg.lr_warmup_steps, steps)
            lr = common.set_lr(session.optimizer, factor)
            loss = sum(
                accumulate_gradients(session, micro_step)
                for micro_step in range(cfg.gradient_accumulation_steps)
            )
            norm = session.update.step()
            loss, stopped_by = processes.agree(loss, stop.name)
            _stop_if_diverged(session, loss, norm)
            if session.ema is not None:
                session.ema.update(session.step)
            session.step += 1
            report.step(session.step, loss, lr)

            last = session.step == steps
            if last or stopped_by or _due(session.step, cfg.checkpoint_every):
                resuming.save(session)
            if stopped_by:
                _stop(session, stopped_by)
            if not last and _due(session.step, session.cfg.sample.every):
                draw_sheet(session, session.run / f"samples/step-{session.step}.png")
            report.pause()
    report.end_loop()


def accumulate_gradients(session: Session, micro_step: int) -> float:
    """One forward and backward pass; returns its share of the step's loss."""
    cfg, inputs, processes = session.cfg.train, session.inputs, session.processes
    device = session.family.components.device
    generator = common.step_generator(
        cfg.seed, session.step, micro_step, device, rank=processes.rank
    )
    count = session.step * cfg.gradient_accumulation_steps + micro_step
    batch = inputs.batch(count, cfg.batch_size, processes.part)
    last_pass = micro_step == cfg.gradient_accumulation_steps - 1
    with adapters.cores_ahead(session.cfg, session.models):
        losses = _subject_losses(session, batch, generator)
        loss = (losses * batch.weights).mean() / cfg.gradient_accumulation_steps
        session.update.backward(loss, last=last_pass and cfg.prior != "base_prediction")
    total = loss.item()
    if cfg.prior == "base_prediction":
        # Backward apart from the subject's: half the activations are alive at a time.
        with adapters.cores_ahead(session.cfg, session.models):
            losses = _base_prediction_losses(session, batch, generator)
            loss = cfg.prior_weight * losses.mean() / cfg.gradient_accumulation_steps
            session.update.backward(loss, last=last_pass)
        total += loss.item()
    return total


def _subject_losses(session: Session, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """(B,) losses of predicting the noise on the photos."""
    family, inputs = session.family, session.inputs
    if session.cfg.text_encoder.train:
        conditioning = _encode(family, inputs.prompts, batch.prompt_rows)
    else:
        conditioning = inputs.conditioning.select(batch.prompt_rows)
    conditioning = family.frame(conditioning, batch.framings)
    return family.loss(
        family.components.denoiser, batch.latents, conditioning, generator,
        options=common.loss_options(session.cfg.train, session.processes.part), mask=batch.mask,
    )  # fmt: skip


def _encode(family: Family, prompts: Sequence[str], rows: Sequence[int]) -> Conditioning:
    """The prompts of these rows, each encoded once: most of a batch has the same."""
    distinct = sorted(set(rows))
    encoded = family.encode_prompts([prompts[row] for row in distinct])
    return encoded.select([distinct.index(row) for row in rows])


def _base_prediction_losses(
    session: Session, batch: Batch, generator: torch.Generator
) -> torch.Tensor:
    """(B,) losses that hold the answer to the class prompt at what the base answers."""
    family, inputs = session.family, session.inputs
    denoiser = family.components.denoiser

    def base(*args: Any, **kwargs: Any) -> Any:
        with switched_off(denoiser):
            return denoiser(*args, **kwargs)

    of_base = family.frame(inputs.class_conditioning.select(batch.class_rows), batch.framings)
    conditioning = of_base
    if session.cfg.text_encoder.train:
        encoded = _encode(family, inputs.class_prompts, batch.class_rows)
        conditioning = family.frame(encoded, batch.framings)
    return family.loss(
        denoiser, batch.latents, conditioning, generator,
        options=common.loss_options(session.cfg.train, session.processes.part),
        reference=(base, of_base),
    )  # fmt: skip


def _stop_if_diverged(session: Session, loss: float, grad_norm: float) -> None:
    # Under float16 the scaler skips a step whose gradient overflows, which is no divergence.
    problem = session.guard.check(loss, None if session.scaler.is_enabled() else grad_norm)
    if problem is None:
        return
    # Weights may have gone wrong some steps before their loss shows it.
    before = session.step - session.guard.WINDOW
    good = newest_path(session.run, before) or newest_path(session.run)
    cfg = session.cfg
    cure = (
        f"Start a new run with a lower train.learning_rate (now {cfg.train.learning_rate:g}), or "
        'with model.dtype = "fp32" if it was not'
    )
    if session.step == 0:  # nothing has been trained yet
        cure = (
            f'It is the answer of model.base = "{cfg.model.base}" itself: use model.dtype = "fp32" '
            "if it was not, or another copy of the base"
        )
    raise common.TrainingDiverged(
        f"stopped at step {session.step + 1}: {problem}. "
        + (f"The last good checkpoint is {good}. " if good else "There is no checkpoint yet. ")
        + cure
    )


def _stop(session: Session, signal_name: str) -> None:
    command = resuming.resume_command(session.run, session.processes)
    message = f"stopped by {signal_name} after step {session.step}; continue with: {command}"
    session.report.event("stopped", session.step, message=message)
    raise common.TrainingInterrupted(message)


def _check_memory(
    cfg: DreamboothConfig, found: Sequence[Found], report: Report, processes: Processes
) -> None:
    """Say what the run will need before anything is loaded; stop where a GPU has less."""
    sizes, shards = [photo.size for photo in all_photos(found)], processes.shards
    pictures = processes.from_first(lambda: count_pictures(cfg, found))
    plan = plan_memory(cfg, pictures, sizes, shards)
    report.say("\n".join(plan.lines()))
    device = resolve_device(cfg.model.device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        check_memory(cfg, plan, free, pictures, sizes, shards)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
