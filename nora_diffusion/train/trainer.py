"""The loop of ``nora llm`` and ``nora vlm``: transformers' ``Trainer``, followed and stopped."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from nora_diffusion import language_config, vision_language_config
from nora_diffusion.adapter import joint_cores
from nora_diffusion.run_command import how_to_resume
from nora_diffusion.run_folder import CHECKPOINTS
from nora_diffusion.schema import RunConfig
from nora_diffusion.train.common import (
    DivergenceGuard,
    StopSignal,
    TrainingDiverged,
    TrainingInterrupted,
)
from nora_diffusion.train.processes import ALONE, Processes
from nora_diffusion.train.report import Report

_STATE = "trainer_state.json"  # the last file that Trainer writes of a checkpoint
_OPTIONS = {"use_reentrant": False}
# Releases of transformers differ in how they call gradient checkpointing.
_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
_CHECKPOINTING = _NEW if _NEW in {field.name for field in fields(TrainingArguments)} else _OLD


def run_loop(
    trainer: Trainer,
    config: RunConfig,
    report: Report,
    *,
    checkpoint: Path | None,
    processes: Processes = ALONE,
    rate_key: str = "train.learning_rate",
) -> None:
    """Train to the last step, from a checkpoint if there is one.

    Args:
        trainer: as ``make_trainer`` gives it.
        config: of the run, for what is told after a stop.
        report: of the run.
        checkpoint: its folder.
        processes: those that train together.
        rate_key: the key of the learning rate.

    Raises:
        TrainingDiverged: when loss or gradient is not finite, or the loss has exploded.
        TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    with StopSignal(patient=processes.count > 1) as stop:
        follow = Follow(report, stop, processes, rate_key)
        trainer.add_callback(follow)
        resumed = "" if checkpoint is None else f", resumed from {checkpoint.name}"
        report.event("start", message=f"{trainer.args.max_steps} steps{resumed}")
        if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
            # Trainer's loop looks at the number of steps only after one more.
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    report.end_loop()
    if follow.stopped_by is not None:
        step, how = trainer.state.global_step, how_to_resume(config, str(report.run))
        told = f"stopped by {follow.stopped_by} after step {step}; {how}"
        report.event("stopped", step, message=told)
        raise TrainingInterrupted(told)


def make_trainer(
    model: nn.Module,
    rows: Any,
    collator: Callable[[Any], Any],
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Transformers' ``Trainer``, which says nothing by itself.

    Args:
        model: with its adapter.
        rows: a sequence or a ``Dataset`` of what ``collator`` makes batches of.
        collator: rows to the model's keyword arguments.
        arguments: such as ``shared_arguments``.
        callbacks: to be told of the training.
    """
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=cast(Any, collator),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Trainer(Trainer):
    """With the cores of all adapted layers computed together in each pass."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass."""
        with joint_cores(model):
            return super().training_step(model, *args, **kwargs)


def shared_arguments(
    cfg: language_config.Train | vision_language_config.Train, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Keywords of ``TrainingArguments`` for a config's section [train], but for learning_rate."""
    checkpointing: dict[str, Any] = {
        _CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": _OPTIONS,
    }  # fmt: skip
    return {
        **(checkpointing if cfg.gradient_checkpointing else {}),
        "output_dir": str(folder),
        "use_cpu": device.type == "cpu",
        "max_steps": cfg.steps,
        "per_device_train_batch_size": cfg.batch_size,
        "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
            cfg.lr_schedule, cfg.lr_schedule
        ),
        # A run of few steps would end before its rate has risen, and one of one step at rate 0.
        "warmup_steps": min(cfg.lr_warmup_steps, cfg.steps // 3),
        "weight_decay": cfg.weight_decay,
        "max_grad_norm": cfg.max_grad_norm,
        "seed": cfg.seed,
        "save_steps": cfg.checkpoint_every,
        "save_total_limit": cfg.checkpoints_keep,
        "logging_steps": 1,  # Report sums up
        "logging_nan_inf_filter": False,  # Follow stops the run instead
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,  # rows are no records of columns
        # All that is trained takes part in every step, and the frozen factors never change.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        # pinning memory asks for a GPU
        "dataloader_pin_memory": device.type == "cuda",
    }


class Follow(TrainerCallback):
    """Reports steps, stops on a signal or when the loss is not finite."""

    def __init__(
        self,
        report: Report,
        stop: StopSignal,
        processes: Processes = ALONE,
        rate_key: str = "train.learning_rate",
    ) -> None:
        """Follow a training with these channels."""
        self.report = report
        self.stop = stop
        self.processes = processes
        self.rate_key = rate_key
        self.guard = DivergenceGuard()
        self.stopped_by: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar."""
        self.report.start_loop(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save and stop, all processes after the same step, where one was sent a signal."""
        self.stopped_by = self.processes.agree(0.0, self.stop.name)[1]
        if self.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take in a finished step, before a checkpoint of it is saved."""
        if "loss" not in logs:  # the summary at the end
            return
        problem = self.guard.check(logs["loss"], logs.get("grad_norm"))
        if problem is not None:
            raise TrainingDiverged(
                f"stopped at step {state.global_step}: {problem}. Start a new run with a lower "
                f"{self.rate_key} (now {args.learning_rate:g})"
            )
        self.report.step(state.global_step, logs["loss"], logs["learning_rate"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that a checkpoint is there."""
        path = f"{CHECKPOINTS}/checkpoint-{state.global_step}"
        self.report.event("checkpoint", state.global_step, message=path)
        self.report.pause()


def checkpoint_gradients(model: nn.Module) -> None:
    """Turn gradient checkpointing on as ``shared_arguments`` does."""
    getattr(model, f"{_CHECKPOINTING}_enable")(_OPTIONS)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    found = [
        path
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    for path in sorted(found, key=step_of, reverse=True):
        try:
            json.loads((path / _STATE).read_bytes())
            return path
        except (OSError, ValueError):
            warnings.warn(f"{path} was not written to its end and is passed over", stacklevel=2)
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
