"""The recipe for language models: from instruction files to an adapter.

Read from top to bottom: base, examples, adapter, score, train (``trainer.py``), save, score again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from nora_diffusion.adapter import fit_basis, fit_start
from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import PEFT_CONFIG, export_lora
from nora_diffusion.adapter.targets import ATTENTION, attention_projections
from nora_diffusion.data.instructions import Encoded, Example, encode_files
from nora_diffusion.data.packing import Collator, pack
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.multiple_choice import Scores, evaluate, table
from nora_diffusion.evaluation.questions import read_questions
from nora_diffusion.families.base import resolve_device
from nora_diffusion.families.quiet import quiet_peft
from nora_diffusion.language_config import Adapter, LanguageConfig, Train
from nora_diffusion.language_model import (
    ADAPTER_FILE,
    LORA_FOLDER,
    check_quantize,
    load_model,
    load_skeleton,
    load_tokenizer,
    locate,
    takes_logits_to_keep,
)
from nora_diffusion.run_command import how_to_resume
from nora_diffusion.run_config import save_config
from nora_diffusion.run_folder import CHECKPOINTS, open_folder
from nora_diffusion.settings import UserError, check_expression, quote
from nora_diffusion.train.common import (
    FIT_BATCHES,
    START_BATCHES,
    adapter_tensors,
    as_recomputed,
    nora_config,
)
from nora_diffusion.train.processes import Processes, join
from nora_diffusion.train.report import Report
from nora_diffusion.train.trainer import (
    checkpoint_gradients,
    make_trainer,
    newest_checkpoint,
    run_loop,
    shared_arguments,
)
from nora_diffusion.train.write_errors import explained, failures_reported

SCORES = "scores.json"
ORIGIN = "origin.json"


def run(cfg: LanguageConfig, *, resume: bool = False) -> Path:
    """Train an adapter as the config says.

    Args:
        cfg: the settings.
        resume: continue the run in ``output.dir`` from its newest checkpoint; on the CPU the
            weights come out bit-identical to those of a run that was never stopped.

    Returns:
        The run folder: ``adapter.safetensors`` (NoRA), ``lora/`` in PEFT's layout, ``scores.json``.

    Raises:
        UserError: on settings, data or a folder that cannot be used.
        TrainingDiverged: when loss or gradient is not finite, or the loss has exploded.
        TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        ProcessLost: when another process of the run has gone.
    """
    processes = join()
    folder = Path(cfg.output.dir).expanduser()
    how_to_go_on = partial(how_to_resume, cfg, str(folder))
    with explained(folder, cfg.command), processes.together(how_to_go_on):
        device = _check(cfg)[0]
        tokenizer = load_tokenizer(cfg.model.base)
        encoded = encode_files(tokenizer, cfg.data.files, cfg.data.max_tokens)
        processes.from_first(lambda: _begin(cfg, folder, resume))
        report = Report(
            folder, total_steps=cfg.train.steps, log_every=cfg.train.log_every,
            silent=not processes.first,
        )  # fmt: skip
        with report, failures_reported(report, cfg.command):
            _run(cfg, folder, resume, device, tokenizer, encoded, report, processes)
    return folder


def describe(cfg: LanguageConfig) -> list[str]:
    """What a run would find, for a dry run.

    Raises:
        UserError: on settings or data that cannot be used.
    """
    device, questions = _check(cfg)
    tokenizer = load_tokenizer(cfg.model.base)
    encoded = encode_files(tokenizer, cfg.data.files, cfg.data.max_tokens)
    skeleton = load_skeleton(cfg.model.base)
    model = add_adapter(skeleton, adapter_config(cfg.adapter, skeleton))
    rows = make_rows(cfg, encoded.examples)
    return [*unused_settings(cfg.adapter), str(encoded), *questions, _sizes(model, rows, device)]


def _sizes(model: nn.Module, rows: Sequence[object], device: torch.device) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{len(rows)} rows; {trained:,} trained parameters on {device}"


def _run(
    cfg: LanguageConfig,
    folder: Path,
    resume: bool,
    device: torch.device,
    tokenizer: Any,
    encoded: Encoded,
    report: Report,
    processes: Processes,
) -> None:
    for line in (*unused_settings(cfg.adapter), str(encoded)):
        report.say(line)
    processes.from_first(lambda: _check_origin(cfg, folder, encoded, resume))
    base = load_model(cfg.model.base, cfg.model.dtype, device, cfg.model.quantize)
    before = _score(cfg, base, tokenizer, processes)

    collator = Collator(tokenizer.pad_token_id, cfg.data.packing, takes_logits_to_keep(base))
    rows = make_rows(cfg, encoded.examples)
    config = adapter_config(cfg.adapter, base)
    checkpoint = newest_checkpoint(folder) if resume else None
    model = add_adapter(base, config)
    if checkpoint is None:  # else its files hold the fitted factors
        fit(model, config, rows, collator, cfg.train)
        # What was fitted on several GPUs need not agree to the last bit, nor in its signs.
        processes.copy_from_first(adapter_tensors([model]))
    report.say(_sizes(model, rows, device))
    arguments = training_arguments(cfg.train, folder / CHECKPOINTS, device)
    trainer = make_trainer(model, rows, collator, arguments)
    run_loop(trainer, cfg, report, checkpoint=checkpoint, processes=processes)
    if processes.first:
        save(cfg, model, folder)
    after = _score(cfg, model, tokenizer, processes)
    if before and processes.first:
        report.say(_write_scores(folder, before, after))
    told = f"finished; everything is in {folder}"
    report.say(told)
    report.event("done", cfg.train.steps, message=told)


def adapter_config(cfg: Adapter, base: nn.Module) -> PeftConfig:
    """What PEFT shall add to the base.

    Raises:
        UserError: when nothing in the base is meant by ``adapter.target_modules``.
    """
    targets: Any = cfg.target_modules
    if targets == ATTENTION:
        try:
            targets = list(attention_projections(base))
        except ValueError as error:
            raise UserError(f"adapter.target_modules: {error}") from error
    targets = list(targets) if isinstance(targets, tuple) else targets
    if isinstance(targets, str):
        cure = (
            'one that matches whole module names, names as in ["q_proj", "v_proj"], or "all-linear"'
        )
        check_expression(f"adapter.target_modules = {quote(targets)}", targets, cure)
    if cfg.method == "lora":
        return LoraConfig(
            r=cfg.r,
            lora_alpha=cast(int, cfg.scaling * cfg.r),
            lora_dropout=cfg.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
    return nora_config(cfg, targets, task_type="CAUSAL_LM")


def unused_settings(cfg: Adapter) -> list[str]:
    """What is set of NoRA where LoRA is trained in its place, in words."""
    why = 'not used; adapter.method = "lora" has no such setting'
    return [f"adapter.{name} = {quote(getattr(cfg, name))}: {why}" for name in cfg.unused()]


def add_adapter(base: Any, config: PeftConfig, seed: int | None = None) -> PeftModel:
    """The base with an adapter, ready to be trained.

    A quantised base is one like others: ``prepare_model_for_kbit_training`` of PEFT would turn all
    that is not quantised, and with it every activation, into float32.

    Raises:
        UserError: when no module matches ``adapter.target_modules``.
    """
    # LoRA draws its start from torch's own generator.
    torch.manual_seed(getattr(config, "seed", 0) if seed is None else seed)
    try:
        with quiet_peft():
            return cast(PeftModel, get_peft_model(base, config))
    except (TypeError, ValueError) as error:  # none found, or one that is no linear layer
        if "arget module" not in str(error):
            raise
        raise UserError(f"adapter.target_modules: {error}") from error


def make_rows(cfg: LanguageConfig, examples: Sequence[Example]) -> list[list[Example]]:
    """Rows of a batch: an example each, or several where they are packed."""
    if cfg.data.packing:
        return pack(examples, cfg.data.max_tokens)
    return [[example] for example in examples]


def fit(
    model: PeftModel,
    config: PeftConfig,
    rows: Sequence[Sequence[Example]],
    collator: Collator,
    cfg: Train,
    batches: int = FIT_BATCHES,
) -> None:
    """Fit what NoRA takes from training data: a data-driven basis, ``init="gradient"``."""
    device = next(model.parameters()).device
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed)).tolist()

    def starts(count: int) -> range:
        return range(0, min(len(rows), count * cfg.batch_size), cfg.batch_size)

    def step(start: int) -> Tensor:
        batch = collator([rows[i] for i in order[start : start + cfg.batch_size]])
        return model(**send_to_device(batch, device)).loss

    if cfg.gradient_checkpointing:
        checkpoint_gradients(model)
    with as_recomputed(model, cfg.gradient_checkpointing):
        if getattr(config, "basis", None) in DATA_BASES:
            fit_basis(model, starts(batches), step)
        if getattr(config, "init", None) == "gradient":
            fit_start(model, starts(min(batches, START_BATCHES)), step)


def training_arguments(cfg: Train, folder: Path, device: torch.device) -> TrainingArguments:
    """The config's section [train] as transformers names it."""
    keywords = shared_arguments(cfg, folder, device)
    return TrainingArguments(**keywords, learning_rate=cfg.learning_rate)


def save(cfg: LanguageConfig, model: PeftModel, folder: Path) -> None:
    """Write the native file and the LoRA export of NoRA, or LoRA's own folder."""
    if cfg.adapter.method == "lora":
        model.save_pretrained(str(folder / LORA_FOLDER), save_embedding_layers=False)
        return
    save_adapter(
        model,
        folder / ADAPTER_FILE,
        metadata={"base": cfg.model.base, "steps": cfg.train.steps, "training": {
            "files": list(cfg.data.files), "learning_rate": cfg.train.learning_rate,
            "batch_size": cfg.train.batch_size, "seed": cfg.train.seed,
        }},
    )  # fmt: skip
    if not cfg.output.lora:
        return
    export_lora(folder / ADAPTER_FILE, folder / LORA_FOLDER, layout="peft", base=model)
    # What AutoPeftModelForCausalLM reads.
    file = folder / LORA_FOLDER / PEFT_CONFIG
    described = json.loads(file.read_bytes())
    described |= {"base_model_name_or_path": cfg.model.base, "task_type": "CAUSAL_LM"}
    write_atomically(file, json.dumps(described, indent=2, sort_keys=True).encode())


def _check(cfg: LanguageConfig) -> tuple[torch.device, list[str]]:
    """Device and questions, in words: what can be refused before anything is loaded or written."""
    device = resolve_device(cfg.model.device)
    check_quantize(cfg.model.quantize, device)
    locate(cfg.model.base)
    return device, _count_questions(cfg)


def _begin(cfg: LanguageConfig, folder: Path, resume: bool) -> None:
    open_folder(folder, resume, cfg.command)
    save_config(cfg, folder)


def _count_questions(cfg: LanguageConfig) -> list[str]:
    """How many questions each file has, in words."""
    found = []
    for file in cfg.eval.files:
        try:
            found.append(f"{file}: {len(read_questions(file, cfg.eval.limit))} questions")
        except UserError as error:
            raise UserError(f"eval.files: {error}; [] asks none") from None
    return found


def _check_origin(cfg: LanguageConfig, folder: Path, encoded: Encoded, resume: bool) -> None:
    """Refuse to continue a run on other examples than those it was started with."""
    digest = hashlib.sha256(json.dumps([vars(e) for e in encoded.examples]).encode()).hexdigest()
    file = folder / ORIGIN
    if resume and file.is_file() and json.loads(file.read_bytes())["examples"] != digest:
        raise UserError(
            f"data.files = {quote(cfg.data.files)}: not the examples (or not the tokenizer) this "
            "run was started with; restore them, or start a new run in another output.dir"
        )
    write_atomically(file, json.dumps({"examples": digest}).encode())


def _score(
    cfg: LanguageConfig, model: nn.Module, tokenizer: Any, processes: Processes
) -> list[Scores]:
    """Scores on ``eval.files``, in the first process; the others wait."""
    return processes.from_first(
        lambda: [
            evaluate(
                model, tokenizer, file, limit=cfg.eval.limit, batch_size=cfg.eval.batch_size,
                max_new_tokens=cfg.eval.max_new_tokens,
            )
            for file in cfg.eval.files
        ]
    )  # fmt: skip


def _write_scores(folder: Path, before: Sequence[Scores], after: Sequence[Scores]) -> str:
    def summary(scores: Scores) -> dict[str, float]:
        return {
            "likelihood": scores.likelihood_accuracy,
            "generated": scores.generated_accuracy,
        }

    rows = [
        {"file": first.name, "questions": len(first.correct), "chance": first.chance,
         "before": summary(first), "after": summary(last)}
        for first, last in zip(before, after, strict=True)
    ]  # fmt: skip
    write_atomically(folder / SCORES, json.dumps(rows, indent=2).encode())
    return table([("before", before), ("after", after)])
