"""What a run leaves behind: sheets, samples, the adapter, its LoRA export, the model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.adapter.switch import switched_off
from nora_diffusion.disk import write_atomically
from nora_diffusion.families import built_in_version
from nora_diffusion.families.base import DTYPES
from nora_diffusion.sampling import (
    ADAPTER_FILE,
    picture_path,
    sample_conditioning,
    save_png,
)
from nora_diffusion.sheets import before_after_sheet, contact_sheet
from nora_diffusion.train import adapters
from nora_diffusion.train.model_card import PEFT_FOLDER, model_card
from nora_diffusion.train.optimizers import evaluation_weights
from nora_diffusion.train.photos import distinct_subjects, scene_prompts
from nora_diffusion.train.session import Session

LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"
SHEET = "samples/sheet.png"
BEFORE_AFTER = "before_after.png"


def draw_sheet(session: Session, path: Path) -> None:
    """Write a validation sheet of ``sample.prompts`` and announce it."""
    if not session.draws:
        return
    rows = _draw(session)
    if session.processes.first:
        _write_sheet(session, rows, path)


def write_outcome(session: Session) -> None:
    """Write everything a finished run folder holds; doing it again replaces it."""
    cfg, run = session.cfg, session.run
    if session.processes.first:
        _write_adapter(session)
    if not session.draws:
        return
    session.report.say(f"drawing the samples in {run / 'samples'}")
    after = _draw(session)
    before = _draw(session, adapted=False)
    if not session.processes.first:
        return
    _write_samples(session, after)
    _write_sheet(session, after, run / SHEET)
    compared = before_after_sheet(session.inputs.squares, scene_prompts(cfg), before, after)
    save_png(compared, run / BEFORE_AFTER, _origin(session))
    session.report.picture(session.step, run / BEFORE_AFTER, compared, "before and after")
    write_atomically(run / CARD_FILE, model_card(session).encode())


def _write_adapter(session: Session) -> None:
    cfg, run, parts = session.cfg, session.run, session.family.components
    with _averaged(session):
        save_adapter(
            parts.pipeline,
            run / ADAPTER_FILE,
            adapters.NAME,
            portable=_portable(session),
            dtype=None if cfg.output.dtype is None else DTYPES[cfg.output.dtype],
            metadata=describe(session),
        )
    if not cfg.output.lora:
        return
    # The export needs every weight of the base, of which FSDP has left a part here.
    base = parts.base if session.processes.shards > 1 else parts.pipeline
    export_lora(run / ADAPTER_FILE, run / LORA_FILE, base=base)
    if not hasattr(parts.pipeline, "load_lora_weights"):  # PixArt: PEFT itself loads what it wrote
        export_lora(run / ADAPTER_FILE, run / PEFT_FOLDER, layout="peft", base=base)


def describe(session: Session) -> dict[str, Any]:
    """What the adapter file says of its origin."""
    cfg, parts = session.cfg, session.family.components
    first, *others = distinct_subjects(cfg)
    named = [{"trigger": one.trigger, "class_name": one.class_name} for one in (first, *others)]
    of_process = cfg.train.batch_size * cfg.train.gradient_accumulation_steps
    pictures = of_process * session.processes.count
    return {
        "base": parts.base,
        "base_hash": session.base_hash,
        **built_in_version(parts.base),
        "family": session.family.name,
        "trigger": first.trigger,
        "class_name": first.class_name,
        **({"subjects": named} if others else {}),
        "steps": session.step,
        "training": {
            "photos": len(session.inputs.photos),
            "batch_size": pictures,
            "learning_rate": cfg.train.learning_rate,
            "prior": cfg.train.prior,
            "seed": cfg.train.seed,
            "dtype": str(parts.dtype).removeprefix("torch."),
        },
    }


@contextmanager
def _averaged(session: Session) -> Iterator[None]:
    """The moving average in place of the parameters, or the optimiser's, where there is one."""
    average = (
        evaluation_weights(session.optimizer, session.parameters)
        if session.ema is None
        else session.ema.applied()
    )
    with average:
        yield


@torch.no_grad()
def _draw(session: Session, *, adapted: bool = True) -> list[list[Image.Image]]:
    """Pictures of ``sample.prompts``, a row each, with the adapter or by the base alone."""
    cfg, family, inputs = session.cfg.sample, session.family, session.inputs
    seeds = range(cfg.seed, cfg.seed + cfg.n)
    settings: dict[str, Any] = {"steps": cfg.steps, "guidance": cfg.guidance}
    models = list(session.models.values())
    for model in models:
        model.eval()
    try:
        if not adapted:
            with switched_off(*models):
                return sample_conditioning(
                    family, inputs.scenes, inputs.negative, seeds, **settings
                )
        with _averaged(session):
            scenes, negative = inputs.scenes, inputs.negative
            if session.cfg.text_encoder.train:
                scenes = family.encode_prompts(scene_prompts(session.cfg))
                negative = family.encode_prompts([cfg.negative_prompt], negative=True)
            return sample_conditioning(family, scenes, negative, seeds, **settings)
    finally:
        for model in models:
            model.train()


def _write_sheet(session: Session, rows: list[list[Image.Image]], path: Path) -> None:
    cfg = session.cfg.sample
    columns = [f"seed {cfg.seed + index}" for index in range(cfg.n)]
    sheet = contact_sheet(rows, scene_prompts(session.cfg), columns, title=f"step {session.step}")
    save_png(sheet, path, _origin(session))
    session.report.picture(session.step, path, sheet, "samples")


def _write_samples(session: Session, rows: list[list[Image.Image]]) -> None:
    seed = session.cfg.sample.seed
    for index, (prompt, row) in enumerate(zip(scene_prompts(session.cfg), rows, strict=True)):
        for offset, image in enumerate(row):
            path = picture_path(session.run / "samples", index, prompt, seed + offset)
            origin = {"prompt": prompt, "seed": seed + offset, **_origin(session)}
            save_png(image, path, origin)


def _origin(session: Session) -> dict[str, Any]:
    cfg = session.cfg.sample
    return {
        "negative_prompt": cfg.negative_prompt,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "adapter": ADAPTER_FILE,
        "training_steps": session.step,
        "base": session.family.components.base,
        "family": session.family.name,
    }


def _portable(session: Session) -> bool:
    """Whether the file must carry the outer factors: only if no weight yields them again."""
    if session.cfg.output.portable is not None:
        return session.cfg.output.portable
    return session.cfg.adapter.basis in DATA_BASES
