"""NoRA on a vision-language model, for image instructions: ``nora vlm``, task instructions.

The loop is in ``trainer.py``; here are the data, the adapter and the evaluation. Any
`AutoModelForImageTextToText` will do whose processor has a chat template.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments

from nora_diffusion.adapter import attention_projections
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.data.image_batches import (
    Records,
    collate,
    learns_from_trained_positions,
    pad_id_of,
    with_trained_positions,
)
from nora_diffusion.data.image_instructions import (
    NO_FILE,
    PictureError,
    Record,
    read_records,
)
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.picture_answers import ask
from nora_diffusion.families.base import resolve_device
from nora_diffusion.families.quiet import quiet_peft
from nora_diffusion.run_command import how_to_resume
from nora_diffusion.run_config import save_config
from nora_diffusion.run_folder import CHECKPOINTS, RESULTS, open_folder
from nora_diffusion.settings import UserError, quote
from nora_diffusion.train.common import nora_config
from nora_diffusion.train.processes import ALONE, Processes, join
from nora_diffusion.train.report import Report
from nora_diffusion.train.trainer import (
    make_trainer,
    newest_checkpoint,
    run_loop,
    shared_arguments,
)
from nora_diffusion.train.vlm_base import check_base, load_vlm
from nora_diffusion.train.write_errors import explained, failures_reported
from nora_diffusion.vision_language_config import VisionLanguageConfig

ADAPTER, LORA = "adapter.safetensors", "lora"
VISION = re.compile(r"\b(vision_tower|vision_model|visual)\b")
LANGUAGE = re.compile(r"\b(language_model|text_model)\b")


def run(config: VisionLanguageConfig, resume: bool = False) -> Path:
    """Asks the test questions, trains an adapter, asks again.

    Args:
        config: of task instructions.
        resume: continue from the newest checkpoint.

    Returns:
        The path of the results.

    Raises:
        UserError: data, base model or run folder cannot be used.
        TrainingDiverged: when loss or gradient is not finite, or the loss has exploded.
        TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        ProcessLost: when another process of the run has gone.
    """
    processes = join()
    folder = Path(config.output.dir).expanduser()
    how_to_go_on = partial(how_to_resume, config, str(folder))
    with explained(folder, config.command), processes.together(how_to_go_on):
        _, train, test = _check(config)
        model, processor = load_vlm(config)
        processes.from_first(lambda: _begin(config, folder, resume))
        report = Report(
            folder, total_steps=config.train.steps, log_every=config.train.log_every,
            silent=not processes.first,
        )  # fmt: skip
        with report, failures_reported(report, config.command):
            return train_adapter(config, model, processor, train, test, report, processes)


def describe(config: VisionLanguageConfig) -> list[str]:
    """What a run would find, for a dry run; nothing is loaded or asked of the hub.

    Raises:
        UserError: on settings or data that cannot be used.
    """
    device, train, test = _check(config)
    return [f"{len(train)} records to learn, {len(test)} to ask, on {device}"]


def find_targets(model: nn.Module, towers: Sequence[str]) -> list[str]:
    """Names of the attention projections in the given towers, "vision" and "language".

    Raises:
        UserError: there are none.
    """
    names = []
    for name in attention_projections(model):
        tower = "vision" if VISION.search(name) else "language" if LANGUAGE.search(name) else None
        if tower in towers:
            names.append(name)
    if not names:
        raise UserError(f"adapter.towers = {list(towers)}: no attention projections found there")
    return names


def train_adapter(
    config: VisionLanguageConfig,
    model: Any,
    processor: Any,
    train: Sequence[Record],
    test: Sequence[Record],
    report: Report,
    processes: Processes = ALONE,
) -> Path:
    """Trains an adapter on `train`, from the run's newest checkpoint if there is one.

    Args:
        config: of task instructions.
        model: the frozen base; it carries the trained adapter afterwards.
        processor: its processor.
        train: records to learn.
        test: records to ask before and after.
        report: of the run.
        processes: those that train together.

    Returns:
        The path of ``results.json``: accuracy before and after, and what was said.

    Raises:
        TrainingDiverged: when loss or gradient is not finite, or the loss has exploded.
        TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    folder, path = report.run, report.run / RESULTS
    with _pictures_of("data.train"):
        data = Records(processor, train, config.data.max_length)
    told = f"{len(data)} records to learn, the longest of {data.longest} tokens"
    if data.left_out:
        told += f"; {data.left_out} longer than data.max_length = {config.data.max_length} left out"
    report.say(told)
    result = processes.from_first(lambda: _read(path))

    def ask_all(when: str, of: Any) -> None:
        with _pictures_of("data.test"):
            result[when] = processes.from_first(lambda: ask(of, processor, test))
        report.say(f"{when}: {result[when]['accuracy']:.1%} right")

    if test and "before" not in result:
        ask_all("before", model)
        if processes.first:
            _write(path, result)
    targets = find_targets(model, config.adapter.towers)
    with quiet_peft():
        adapted = get_peft_model(model, nora_config(config.adapter, targets))
    arguments = TrainingArguments(
        **shared_arguments(config.train, folder / CHECKPOINTS, model.device),
        learning_rate=config.adapter.learning_rate,
    )
    trainer = make_trainer(adapted, data, _batches(model, processor, data), arguments)
    run_loop(
        trainer, config, report, checkpoint=newest_checkpoint(folder), processes=processes,
        rate_key="adapter.learning_rate",
    )  # fmt: skip
    if processes.first:
        about = {"base": config.model.base, "steps": config.train.steps}
        save_adapter(adapted, folder / ADAPTER, metadata=about)
        export_lora(folder / ADAPTER, folder / LORA, layout="peft", base=adapted)
    result["trainable_parameters"] = adapted.get_nb_trainable_parameters()[0]
    result["steps"] = config.train.steps
    if test:
        ask_all("after", adapted)
    if processes.first:
        _write(path, result)
    report.event("done", config.train.steps, message=f"results in {RESULTS}")
    return path


def _batches(model: Any, processor: Any, data: Records) -> Callable[[Any], dict[str, Any]]:
    """Makes a batch of encoded records, with logits where they are trained if the model can."""
    pad_id = pad_id_of(processor)
    first = {key: value.to(model.device) for key, value in collate([data[0]], pad_id).items()}
    if learns_from_trained_positions(model, first):
        return lambda items: with_trained_positions(collate(items, pad_id))
    return lambda items: collate(items, pad_id)


def _check(config: VisionLanguageConfig) -> tuple[torch.device, list[Record], list[Record]]:
    """What can be refused before anything is loaded or written: device, base, and the records."""
    device = resolve_device(config.model.device, mps=False)
    check_base(config.model.base)
    data = config.data
    if data.images is not None and not Path(data.images).expanduser().is_dir():
        raise UserError(f"data.images = {quote(data.images)}: no such folder")
    train = _read_records(config, "data.train", str(data.train))
    test = [] if data.test is None else _read_records(config, "data.test", data.test)
    return device, train, test


def _read_records(config: VisionLanguageConfig, key: str, file: str) -> list[Record]:
    images = config.data.images
    try:
        return read_records(file, images)
    except UserError as error:
        told = f"{key}: {error}"
        if NO_FILE in told:
            start = (
                "the folder of their file" if images is None else f"data.images = {quote(images)}"
            )
            told += f"\n  paths of pictures start from {start}"
        raise UserError(told) from None


@contextmanager
def _pictures_of(key: str) -> Iterator[None]:
    """Name the key of a picture that proves broken when it is decoded."""
    try:
        yield
    except PictureError as error:
        raise UserError(f"{key}: {error}") from None


def _begin(config: VisionLanguageConfig, folder: Path, resume: bool) -> None:
    open_folder(folder, resume, config.command)
    if not resume:  # else they hold what the base has answered
        (folder / RESULTS).unlink(missing_ok=True)
    save_config(config, folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, result: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
