"""NoRA on a vision-language model, for image instructions: ``nora vlm``, task instructions.

The trainer is transformers' own; here are the data, the adapter and the evaluation. Any
`AutoModelForImageTextToText` will do whose processor has a chat template.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from nora_diffusion.adapter import attention_projections
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.data.image_batches import Records, collate, pad_id_of
from nora_diffusion.data.image_instructions import Record, read_records
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.picture_answers import ask
from nora_diffusion.events import EventLog
from nora_diffusion.families.base import resolve_device, resolve_dtype
from nora_diffusion.run_config import save_config
from nora_diffusion.run_folder import CHECKPOINTS, EVENTS
from nora_diffusion.settings import UserError
from nora_diffusion.train.common import nora_config
from nora_diffusion.vision_language_config import VisionLanguageConfig

RESULTS, ADAPTER, LORA = "results.json", "adapter.safetensors", "lora"
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
        UserError: data or base model cannot be used.
    """
    model, processor = load_vlm(config)
    data = config.data
    train = read_records(str(data.train), data.images)
    test = read_records(data.test, data.images) if data.test is not None else []
    folder = Path(config.output.dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        save_config(config, folder)
    return train_adapter(config, model, processor, train, test, folder)


def load_vlm(config: VisionLanguageConfig) -> tuple[Any, Any]:
    """Returns the frozen model and its processor.

    Raises:
        UserError: it cannot be loaded, has no chat template, or there is no such device.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = config.model.base
    device = resolve_device(config.model.device, mps=False)
    dtype = resolve_dtype(config.model.dtype, device)
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
        processor = AutoProcessor.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(
            f'model.base = "{base}": no model that reads pictures and writes text could be loaded: '
            f"{error}"
        ) from None
    if not getattr(processor, "chat_template", None):
        raise UserError(f'model.base = "{base}": its processor has no chat template')
    return model.requires_grad_(False).to(device), processor  # pyright: ignore[reportArgumentType]


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


class _Told(TrainerCallback):
    """Writes the trainer's log and checkpoints to ``events.jsonl``."""

    def __init__(self, events: EventLog):
        self.events = events

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes loss and learning rate."""
        if logs and "loss" in logs:
            self.events.write(
                "step", state.global_step, loss=logs["loss"], lr=logs["learning_rate"]
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Writes that a checkpoint is there."""
        self.events.write("checkpoint", state.global_step)


def train_adapter(
    config: VisionLanguageConfig,
    model: Any,
    processor: Any,
    train: Sequence[Record],
    test: Sequence[Record],
    folder: Path,
) -> Path:
    """Trains an adapter on `train`, from the newest checkpoint in `folder` if there is one.

    Args:
        config: of task instructions.
        model: the frozen base; it carries the trained adapter afterwards.
        processor: its processor.
        train: records to learn.
        test: records to ask before and after.
        folder: the run folder.

    Returns:
        The path of ``results.json``: accuracy before and after, and what was said.
    """
    events = EventLog(folder / EVENTS)
    data = Records(processor, train, config.data.max_length)
    told = f"{len(data)} records to learn, the longest of {data.longest} tokens"
    if data.left_out:
        told += f"; {data.left_out} longer than data.max_length = {config.data.max_length} left out"
    print(told, flush=True)
    events.write("start", 0, message=told)
    path = folder / RESULTS
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if test and "before" not in result:
        result["before"] = ask(model, processor, test)
        print(f"before: {result['before']['accuracy']:.1%} right", flush=True)
        _write(path, result)
    targets = find_targets(model, config.adapter.towers)
    adapted = get_peft_model(model, nora_config(config.adapter, targets))
    trainer = Trainer(
        model=adapted,
        args=_arguments(config, folder),
        train_dataset=data,
        data_collator=lambda items: collate(items, pad_id_of(processor)),
        callbacks=[_Told(events)],
    )
    checkpoints = list((folder / CHECKPOINTS).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    about = {"base": config.model.base, "steps": trainer.state.global_step}
    save_adapter(adapted, folder / ADAPTER, metadata=about)
    export_lora(folder / ADAPTER, folder / LORA, layout="peft", base=adapted)
    result["trainable_parameters"] = adapted.get_nb_trainable_parameters()[0]
    result["steps"] = trainer.state.global_step
    if test:
        result["after"] = ask(adapted, processor, test)
        print(f"after: {result['after']['accuracy']:.1%} right", flush=True)
    _write(path, result)
    events.write("done", trainer.state.global_step, message=f"results in {RESULTS}")
    return path


def _arguments(config: VisionLanguageConfig, folder: Path) -> TrainingArguments:
    train = config.train
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        learning_rate=config.adapter.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=train.lr_warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing,
        save_steps=train.checkpoint_every,
        save_total_limit=2,
        logging_steps=10,
        seed=train.seed,
        use_cpu=config.model.device == "cpu",
        remove_unused_columns=False,  # the collator's keys are the processor's
        label_names=["labels"],
        report_to=[],
    )


def _write(path: Path, result: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
