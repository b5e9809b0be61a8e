"""All that comes before the first step: load, freeze, encode once, add the adapter, resume."""

from __future__ import annotations

from pathlib import Path

import torch

from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.families import load_family, speed
from nora_diffusion.families.base import Family, resolve_device, resolve_dtype
from nora_diffusion.families.encoding import save_vae_memory
from nora_diffusion.families.loading import is_staged
from nora_diffusion.families.offload import offload_layers
from nora_diffusion.schema import get_key
from nora_diffusion.settings import quote
from nora_diffusion.train import adapters, common
from nora_diffusion.train.checkpoint import Checkpoint
from nora_diffusion.train.inputs import Inputs, encode_inputs
from nora_diffusion.train.launcher import deepspeed_settings, fsdp_settings
from nora_diffusion.train.optimizers import check_optimizer, make_optimizer, rate_groups
from nora_diffusion.train.processes import ALONE, Processes
from nora_diffusion.train.publish import check_upload
from nora_diffusion.train.report import Report
from nora_diffusion.train.session import Session
from nora_diffusion.train.sharding import shard_denoiser
from nora_diffusion.train.trackers import check_trackers
from nora_diffusion.train.update import Update
from nora_diffusion.train.zero import ZeroUpdate


def check_extras(cfg: DreamboothConfig) -> None:
    """Refuse, before anything is written, what this installation cannot do.

    Raises:
        UserError: naming the key, and what to install or to set.
    """
    check_optimizer(cfg)
    check_trackers(cfg)
    check_upload(cfg)


def prepare(
    cfg: DreamboothConfig,
    folder: Path,
    report: Report,
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
) -> Session:
    """Load the base, encode pictures and prompts, add the adapter, make the optimiser.

    With a checkpoint the session goes on from there.
    """
    device = resolve_device(cfg.model.device)
    dtype = resolve_dtype(cfg.model.dtype, device)
    family = load_base(cfg, dtype, device)
    parts = family.components
    speed.use_attention(parts.denoiser, cfg.model.attention, report.say)
    base_hash = common.weights_digest(parts.denoiser)
    processes.check_same(f'model.base = "{cfg.model.base}"', base_hash)
    inputs = processes.from_first(lambda: encode_inputs(cfg, family, report)).to(device)
    parts.free_image_encoder()
    if not cfg.text_encoder.train:
        parts.free_text_encoders()
    # Of what is to be split no device need hold the whole.
    parts.offloaded = parts.offloaded or processes.shards > 1
    parts.place_rest()

    models = adapters.adapted_models(cfg, family)
    if cfg.train.gradient_checkpointing:  # before anything is fitted: that is a step's backward too
        adapters.checkpoint_gradients(models)
    fitted = checkpoint.tensors.get("outer") if checkpoint else None
    to_fit = adapters.what_is_fitted(cfg) if checkpoint is None else []
    if to_fit:
        report.say(f"fitting {' and '.join(to_fit)} to the photos")
    adapters.add_adapters(cfg, family, inputs, fitted)
    processes.copy_from_first(common.adapter_tensors(models.values()))
    if processes.strategy == "fsdp":
        shard_denoiser(parts.denoiser, fsdp_settings(cfg), device)
    if checkpoint is None:  # else it brings the inner pairs
        batches = report.counted(range(common.START_BATCHES), "fitting")
        adapters.fit_inner_pairs(cfg, family, inputs, models, batches)
    if cfg.model.compile:
        speed.compile_blocks(parts.denoiser)
    parameters = adapters.trained_parameters(models)
    processes.copy_from_first(list(parameters.values()))
    decay = cfg.train.ema_decay
    narrow = adapters.narrower_than_rank(models)
    report.say(
        f"{parts.base} ({family.summary}, {str(dtype).removeprefix('torch.')} on {device}): "
        f"{len(inputs.photos)} photos, {len(parameters) // 2} modules"
        + (f" ({len(narrow)} of them narrower than r, e.g. {narrow[0]})" if narrow else "")
        + f", {sum(p.numel() for p in parameters.values()):,} trained parameters"
        + (f", {processes}" if processes.count > 1 else "")
    )
    optimizer = make_optimizer(cfg.train, rate_groups(cfg, parameters, parts.denoiser_name))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    update = (
        ZeroUpdate(parameters, optimizer, deepspeed_settings(cfg))
        if processes.strategy == "zero2"
        else Update(parameters, optimizer, scaler, processes, cfg.train.max_grad_norm)
    )
    session = Session(
        cfg=cfg, run=folder, report=report, family=family, inputs=inputs, base_hash=base_hash,
        models=models, parameters=parameters, optimizer=optimizer, scaler=scaler, update=update,
        ema=None if decay is None else common.MovingAverage(parameters, decay),
        guard=common.DivergenceGuard(), processes=processes,
    )  # fmt: skip
    if checkpoint is not None:
        _restore(session, checkpoint)
    return session


def _subjects_key(cfg: DreamboothConfig) -> str:
    folders = ", ".join(f'"{one.path}"' for one in cfg.data.each())
    return f"data.subjects ({folders})" if cfg.data.subjects else f"data.subject = {folders}"


def load_base(cfg: DreamboothConfig, dtype: torch.dtype, device: torch.device) -> Family:
    """The base as the section ``model`` says; on CUDA its parts wait on the CPU for their turn.

    Raises:
        UserError: when settings do not go together, or a library is missing.
    """
    check_offload(cfg, device)
    staged = is_staged(device)
    family = load_family(
        cfg.model.base, family=cfg.model.family, dtype=dtype, quantize=cfg.model.quantize,
        device=torch.device("cpu") if staged else device,
    )  # fmt: skip
    parts = family.components
    if staged:
        parts.stage(device)
    if cfg.model.offload == "group":
        # Recomputed layers run in another order than the one that is fetched ahead.
        prefetch = device.type == "cuda" and not cfg.train.gradient_checkpointing
        offload_layers(parts.denoiser, device, prefetch=prefetch)
        parts.offloaded = True
    save_vae_memory(parts.pipeline.vae, cfg.data.resolution_px or family.resolution_px)
    return family


def check_offload(cfg: DreamboothConfig, device: torch.device) -> None:
    """Refuse settings that cannot go with ``model.offload = "group"``.

    Raises:
        UserError: naming them.
    """
    if cfg.model.offload == "none":
        return
    if device.type != "cuda":
        raise UserError(
            f'model.offload = "group": the device is {device.type}, and only CUDA has a memory of '
            'its own to save; use "none"'
        )
    for key, value, cure in (
        ("model.quantize", cfg.model.quantize != "none", "it is small enough to stay on the GPU"),
        ("model.compile", cfg.model.compile, "its layers change place between kernels"),
        ("adapter.basis", cfg.adapter.basis in DATA_BASES, "fit it to data with the base in place"),
    ):
        if value:
            given = quote(get_key(cfg, key))
            raise UserError(f'model.offload = "group": not with {key} = {given} ({cure})')


def _photo_changes(then: list[list[str]], inputs: Inputs) -> str:
    """A line for each photo that is gone, new or changed; empty where it is only their masks."""
    now = inputs.photo_table()
    old = {name: rest for name, *rest in then if [name, *rest] not in now}
    new = {name: rest for name, *rest in now if [name, *rest] not in then}
    lines: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            lines.append(f"{name}: is missing, or cannot be read")
        elif name not in old:
            lines.append(f"{name}: was not there")
        elif old[name][0] != new[name][0]:
            lines.append(f"{name}: is another picture")
        else:
            lines.append(f"{name}: its prompt is {quote(new[name][1])}, was {quote(old[name][1])}")
    return "".join(f"\n  {line}" for line in lines)


def _restore(session: Session, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a fresh session.

    Raises:
        UserError: when photos or base are no longer those of the run.
    """
    cfg, state = session.cfg, checkpoint.state
    for key, given, now in (
        (_subjects_key(cfg), "data", session.inputs.digest),
        (f'model.base = "{cfg.model.base}"', "base_hash", session.base_hash),
    ):
        if state[given] != now:
            raise UserError(
                f"{key}: not what it was when {checkpoint.path} was written, so the run cannot be "
                "continued; bring the old files back, or start a new run in another output.dir"
                + (_photo_changes(state["photos"], session.inputs) if given == "data" else "")
            )
    common.copy_into(session.parameters, checkpoint.tensors["trained"])
    session.update.restore(checkpoint.tensors["optimizer"], state.get("optimizer"))
    if session.ema is not None:
        average = checkpoint.tensors["ema"]
        for name, tensor in session.ema.average.items():
            tensor.copy_(average[name])
    if session.scaler.is_enabled():
        session.scaler.load_state_dict(state["scaler"])
    session.guard = common.DivergenceGuard(state["first_losses"])
    session.step = checkpoint.step
