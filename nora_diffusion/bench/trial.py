"""One training of one method on one subject, by the recipe's own loop, and its measurement."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.bench.methods import Method
from nora_diffusion.bench.record import cpu_name
from nora_diffusion.bench.ruler import PHOTO_PX, TRIGGER, Ruler
from nora_diffusion.config import DreamboothConfig, load_config
from nora_diffusion.families import load_family
from nora_diffusion.families.base import Family
from nora_diffusion.mini.subjects import Views, subject_views, write_views
from nora_diffusion.train import adapters, common
from nora_diffusion.train.dreambooth import train
from nora_diffusion.train.inputs import Inputs, encode_inputs
from nora_diffusion.train.optimizers import make_optimizer, rate_groups
from nora_diffusion.train.processes import ALONE
from nora_diffusion.train.report import Report
from nora_diffusion.train.session import Session
from nora_diffusion.train.update import Update


@dataclass(frozen=True)
class Trial:
    """What is trained: the key of a row of results."""

    method: Method
    subject: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        """Of the row, as JSON has it."""
        return {
            "method": self.method.name,
            "subject": self.subject,
            "learning_rate": self.rate,
            "seed": self.seed,
            "steps": self.steps,
        }


def run_trial(trial: Trial, ruler: Ruler, drift: bool = False) -> dict[str, Any]:
    """Train and measure; a training that diverges scores as one that learns nothing.

    With ``drift`` pictures of the class without the trigger word are drawn and scored as well.
    """
    views = subject_views(trial.subject, ruler.work, PHOTO_PX)
    with tempfile.TemporaryDirectory() as folder:
        cfg = trial_config(trial, views, Path(folder))
        session = open_session(cfg, trial.method, Path(folder), ruler.device)
        start = time.process_time()
        try:
            train(session)
        except common.TrainingDiverged as stop:
            return {**trial.key, "diverged": str(stop)}
        seconds = time.process_time() - start
        size = file_bytes(session, trial.method)
    # Trainings that share a GPU disturb one another: times there say nothing.
    cost = {"step_cpu_s": round(seconds / trial.steps, 4), "processor": cpu_name()}
    if ruler.device.type != "cpu":
        cost = {"device": ruler.device.type}
    for model in session.models.values():
        model.eval()
    drawn = ruler.draw(session.family, views, trial.seed, drift)
    return {
        **trial.key,
        "trained_parameters": sum(p.numel() for p in session.parameters.values()),
        "file_bytes": size,
        **cost,
        **{
            name: round(number, 5) for name, number in ruler.score(drawn, views, trial.seed).items()
        },
    }


def open_session(
    cfg: DreamboothConfig, method: Method, folder: Path, device: torch.device
) -> Session:
    """Base, encoded views, adapter and optimiser, before the first step."""
    steps = cfg.train.total_steps
    report = Report(folder, total_steps=steps, log_every=steps, silent=True)
    family = load_family("mini", dtype=torch.float32, device=device)
    base_hash = common.weights_digest(family.components.denoiser)
    inputs = encode_inputs(cfg, family, report).to(device)
    models = adapters.adapted_models(cfg, family)
    add_method(cfg, method, family, inputs, models)
    parameters = {
        f"{component}.{name}": parameter
        for component, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    denoiser = family.components.denoiser_name
    optimizer = make_optimizer(cfg.train, rate_groups(cfg, parameters, denoiser))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Session(
        cfg=cfg, run=folder, report=report, family=family, inputs=inputs, base_hash=base_hash,
        models=models, parameters=parameters, optimizer=optimizer, scaler=scaler,
        update=Update(parameters, optimizer, scaler, ALONE, cfg.train.max_grad_norm),
        ema=None, guard=common.DivergenceGuard(),
    )  # fmt: skip


def trial_config(trial: Trial, views: Views, folder: Path) -> DreamboothConfig:
    """The shipped config of mini with the trial's own settings."""
    photos = folder / "photos"
    write_views(views.train, photos)
    subject = [f"data.subject={photos}", f"data.class_name={views.class_name}"]
    subject += [f"data.trigger={TRIGGER}"]
    return method_config(trial.method, trial.rate, trial.steps, trial.seed, folder, subject)


def method_config(
    method: Method, rate: float, steps: int, seed: int, folder: Path, subjects: Sequence[str]
) -> DreamboothConfig:
    """The shipped config of mini with a method's settings.

    Args:
        method: what is trained.
        rate: learning rate.
        steps: of the training.
        seed: of everything random.
        folder: where the run folder is made.
        subjects: overrides of ``[data]``.
    """
    settings = {
        "data.cache": "false", "train.steps": steps, "train.learning_rate": rate,
        "train.seed": seed, "train.checkpoint_every": 0, "output.dir": folder / "run",
        "adapter.seed": seed, **method.nora,
    }  # fmt: skip
    targets = [text for kind in method.targets for text in ("--adapter.targets", kind)]
    return load_config("mini", [*(f"{k}={v}" for k, v in settings.items()), *targets, *subjects])


def add_method(
    cfg: DreamboothConfig,
    method: Method,
    family: Family,
    inputs: Inputs,
    models: dict[str, nn.Module],
) -> None:
    """Put the method's adapter on every model, in its initial state."""
    if method.peft is None:
        adapters.add_adapters(cfg, family, inputs)
        adapters.fit_inner_pairs(cfg, family, inputs, models)
        return
    # PEFT draws initial factors from torch's own generator.
    torch.manual_seed(cfg.train.seed)
    of_denoiser = [ending for kind in method.targets for ending in family.targets[kind]]
    for component, model in models.items():
        denoiser = model is family.components.denoiser
        config: Any = method.build(of_denoiser if denoiser else family.text_targets)
        adapters.add_adapter(component, model, config)


def file_bytes(session: Session, method: Method) -> int:
    """Size of the adapter as a file of float16 numbers."""
    if method.peft is None:
        basis = session.cfg.adapter.basis
        pipeline = session.family.components.pipeline
        path = save_adapter(
            pipeline, session.run / "adapter.safetensors", adapters.NAME,
            portable=basis in DATA_BASES, dtype=torch.float16,
        )  # fmt: skip
        return path.stat().st_size
    tensors = {
        f"{component}.{name}": tensor.half().contiguous()
        for component, model in session.models.items()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapters.NAME).items()
    }
    return len(save(tensors))
