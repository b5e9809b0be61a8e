"""What ``accelerate launch`` was told, as far as it is the recipe's to do; the rest is refused."""

from __future__ import annotations

import os
from typing import Any

import torch

from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.families.base import DTYPES, resolve_device, resolve_dtype
from nora_diffusion.schema import get_key
from nora_diffusion.settings import quote
from nora_diffusion.train.processes import Processes


def check_launcher(cfg: DreamboothConfig, processes: Processes) -> None:
    """Refuse, before anything is written, what the launcher asks for and the recipe cannot do.

    Raises:
        UserError: naming the launcher's setting, and what to set.
    """
    device = resolve_device(cfg.model.device)
    if processes.count > 1 and device.type not in ("cpu", "cuda"):
        raise UserError(f"accelerate launch: several processes need CUDA or CPU, not {device.type}")
    dtype = _name(resolve_dtype(cfg.model.dtype, device))
    precision = _told("MIXED_PRECISION", "no")
    if precision not in ("no", dtype):
        raise UserError(
            f"accelerate launch: mixed_precision = {precision}, but the number format is that of "
            f'model.dtype, here "{dtype}"; set mixed_precision to "no", or model.dtype'
        )
    passes = _told("GRADIENT_ACCUMULATION_STEPS", "1")
    if passes not in ("1", "auto", str(cfg.train.gradient_accumulation_steps)):
        raise UserError(
            f"accelerate launch: gradient_accumulation_steps = {passes}, but "
            f"train.gradient_accumulation_steps = {cfg.train.gradient_accumulation_steps}; leave "
            "the launcher's at 1"
        )
    if _told("DYNAMO_BACKEND", "no") != "no":
        raise UserError(
            f"accelerate launch: dynamo_backend = {_told('DYNAMO_BACKEND', 'no')}: set it to "
            '"no"; model.compile = true is what compiles here'
        )
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _told(f"USE_{name}", "false") == "true":
            raise UserError(
                f"accelerate launch: use_{name.lower()}: not supported; use MULTI_GPU, FSDP or "
                "DEEPSPEED with zero_stage: 2 (configs/accelerate)"
            )
    if processes.strategy == "fsdp":
        fsdp_settings(cfg)
    if processes.strategy == "zero2":
        deepspeed_settings(cfg)


def fsdp_settings(cfg: DreamboothConfig) -> Any:
    """The launcher's FSDP settings, as ``accelerate.FullyShardedDataParallelPlugin``.

    Raises:
        UserError: on what cannot be done, by itself or with the run's settings.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate launch: FSDP: {error}") from error
    if plugin.fsdp_version != 2:
        raise UserError("accelerate launch: fsdp_version = 1: set it to 2")
    if plugin.activation_checkpointing:
        raise UserError(
            "accelerate launch: fsdp_activation_checkpointing = true: set it to false; "
            "train.gradient_checkpointing = true does the same here"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy or plugin.ignored_modules:
        raise UserError(
            "accelerate launch: fsdp_auto_wrap_policy = SIZE_BASED_WRAP and fsdp_ignored_modules "
            "are not supported: the denoiser is split by its blocks; leave both out, or name the "
            "blocks in fsdp_transformer_layer_cls_to_wrap"
        )
    for key, clashes in (
        ("model.offload", cfg.model.offload != "none"),
        ("model.quantize", cfg.model.quantize != "none"),
        ("model.compile", cfg.model.compile),
        ("adapter.basis", cfg.adapter.basis in DATA_BASES),
    ):
        if clashes:
            raise UserError(
                f"accelerate launch: FSDP: not with {key} = {quote(get_key(cfg, key))}, which "
                "needs the whole base in each process; change it, or use "
                "configs/accelerate/ddp.yaml"
            )
    return plugin


def deepspeed_settings(cfg: DreamboothConfig) -> dict[str, Any]:
    """The launcher's DeepSpeed settings, with the run's own filled in.

    Raises:
        UserError: when DeepSpeed is missing, or on what cannot be done.
    """
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import is_deepspeed_available

    if not is_deepspeed_available():
        raise UserError(
            "accelerate launch: DeepSpeed is not installed; run: "
            'pip install "nora-diffusion[deepspeed]", or use configs/accelerate/ddp.yaml'
        )
    try:
        given: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except (ValueError, OSError) as error:
        raise UserError(f"accelerate launch: DeepSpeed: {error}") from error
    zero = given["zero_optimization"]
    if zero.get("stage") != 2:
        raise UserError(
            f"accelerate launch: zero_stage = {zero.get('stage')}: only 2 is supported; to split "
            "the base itself use configs/accelerate/fsdp.yaml"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise UserError(
                f"accelerate launch: {part}_device: set it to none; what is trained is so small "
                "that its optimiser needs a few MB"
            )
    for part in ("fp16", "bf16", "amp"):
        if given.get(part, {}).get("enabled") is True:
            raise UserError(
                f"accelerate launch: DeepSpeed's {part}: the number format is that of model.dtype; "
                "leave it out"
            )
    for part in ("optimizer", "scheduler", "activation_checkpointing"):
        if part in given:
            raise UserError(
                f"accelerate launch: {part} in DeepSpeed's config: leave it out; it is the "
                "section train of the run's config that sets this"
            )
    if cfg.train.optimizer != "adamw":
        raise UserError(
            f'train.optimizer = "{cfg.train.optimizer}": not with ZeRO-2, which cuts parameters '
            'into pieces; use "adamw", or configs/accelerate/ddp.yaml'
        )
    if resolve_dtype(cfg.model.dtype, resolve_device(cfg.model.device)) == torch.float16:
        raise UserError('model.dtype = "fp16": not with ZeRO-2; use "bf16" or "fp32"')
    own = {
        "gradient_clipping": cfg.train.max_grad_norm,
        "train_micro_batch_size_per_gpu": cfg.train.batch_size,
    }
    for key, value in own.items():
        if given.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"accelerate launch: {key} = {given[key]}, but the run's own is {value}; leave "
                "the launcher's out"
            )
    rest = {key: value for key, value in given.items() if key != "train_batch_size"}
    # Passes are counted by the recipe, which weighs their losses.
    fixed = {"gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}
    return {**rest, **own, **fixed}


def _told(name: str, default: str) -> str:
    """A setting of the launcher, which hands it on in the environment."""
    return os.environ.get(f"ACCELERATE_{name}", default).lower()


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
