"""Putting NoRA adapters on a family's models, and reaching what is trained in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.mapping import inject_adapter_in_model
from torch import Tensor, nn

from nora_diffusion.adapter import Factors, NoraConfig, iter_nora_layers, joint_cores
from nora_diffusion.adapter.components import adaptable_modules, ignore_lowered_ranks
from nora_diffusion.adapter.factors import DATA_BASES
from nora_diffusion.adapter.start import fit_start
from nora_diffusion.adapter.statistics import fit_basis
from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.denoiser_hooks import attach_timestep_rank, has_timestep_law, load_adapter
from nora_diffusion.families.base import Family
from nora_diffusion.sampling import adapter_path
from nora_diffusion.train.common import (
    FIT_BATCHES,
    START_BATCHES,
    as_recomputed,
    derive_seed,
    nora_config,
)
from nora_diffusion.train.inputs import Inputs

NAME = "default"
"""Name of the adapter in training."""


def adapted_models(cfg: DreamboothConfig, family: Family) -> dict[str, nn.Module]:
    """The models that get an adapter, by component name, denoiser first.

    Text encoders that have none of the family's ``text_targets`` are left as they are: such as the
    T5 of SD 3, for which other programs have no LoRA.
    """
    parts = family.components
    models = {parts.denoiser_name: parts.denoiser}
    endings = tuple(f".{ending}" for ending in family.text_targets)
    for name, encoder in parts.text_encoders.items() if cfg.text_encoder.train else ():
        if any(module.endswith(endings) for module in adaptable_modules(encoder)):
            models[name] = encoder
    return models


def add_adapters(
    cfg: DreamboothConfig,
    family: Family,
    inputs: Inputs,
    fitted: dict[str, Tensor] | None = None,
) -> None:
    """Add the adapters that the config asks for, in their initial or their given state.

    A start that is fitted to the photos comes after it: ``fit_inner_pairs``.

    Args:
        cfg: the settings.
        family: the base model.
        inputs: what a data-driven basis is fitted to.
        fitted: outer factors fitted before, from a checkpoint.

    Raises:
        UserError: when no module matches ``adapter.target_modules``, or ``adapter.init_from`` does
            not fit the config.
    """
    models = adapted_models(cfg, family)
    if cfg.adapter.init_from is not None:
        _load_start(cfg.adapter.init_from, family, models)
    for component, model in models.items():
        config = adapter_config(cfg, family, denoiser=model is family.components.denoiser)
        if any(True for _ in iter_nora_layers(model)):
            _check_start(str(cfg.adapter.init_from), component, model, config)
        else:
            add_adapter(component, model, config)
        for _, layer in iter_nora_layers(model):
            for pair in (layer.nora_inner_A, layer.nora_inner_B):
                pair[NAME] = nn.Parameter(pair[NAME].detach().float())
    denoiser = family.components.denoiser
    if fitted:
        restore_factors(models, fitted)
    elif not all(layer.outer(NAME).derived for _, layer in iter_nora_layers(denoiser)):
        _fit_basis(cfg, family, inputs)
    if family.components.offloaded:
        move_adapters(denoiser, family.components.device)
    if any(has_timestep_law(layer) for _, layer in iter_nora_layers(denoiser)):
        attach_timestep_rank(denoiser, family.num_timesteps)


def what_is_fitted(cfg: DreamboothConfig) -> list[str]:
    """What a new run takes from its data before the first step, in words."""
    if cfg.adapter.init_from is not None:
        return []
    found = ["the outer directions"] if cfg.adapter.basis in DATA_BASES else []
    return [*found, "the start of the inner pairs"] if cfg.adapter.init == "gradient" else found


def adapter_config(cfg: DreamboothConfig, family: Family, *, denoiser: bool) -> NoraConfig:
    """``NoraConfig`` of the denoiser, or of a text encoder."""
    adapter, text = cfg.adapter, cfg.text_encoder
    law = dict(adapter.timestep_rank) if isinstance(adapter.timestep_rank, dict) else (
        adapter.timestep_rank
    )  # fmt: skip
    if denoiser:
        endings = [ending for kind in adapter.targets for ending in family.targets[kind]]
        targets, r, inner_r, basis = (
            list(adapter.target_modules or endings), adapter.r, adapter.inner_r, adapter.basis,
        )  # fmt: skip
    else:  # a text encoder sees no timestep, and its data are a few prompts: too few to fit to
        targets, r, inner_r, law = list(family.text_targets), text.r, text.inner_r, None
        basis = text.basis
    return nora_config(adapter, targets, r=r, inner_r=inner_r, basis=basis, timestep_rank=law)


def trained_parameters(models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The inner pairs by ``component.module.inner_A`` and ``.inner_B``; nothing else is trained."""
    found: dict[str, nn.Parameter] = {}
    for component, model in models.items():
        for name, layer in iter_nora_layers(model):
            found[f"{component}.{name}.inner_A"] = layer.nora_inner_A[NAME]
            found[f"{component}.{name}.inner_B"] = layer.nora_inner_B[NAME]
    return found


def cores_ahead(
    cfg: DreamboothConfig, models: Mapping[str, nn.Module]
) -> AbstractContextManager[None]:
    """For one forward and backward pass: ``joint_cores``, where they are not better left alone."""
    # Compiled layers fuse their own; offloaded ones are on the GPU for their turn alone.
    if cfg.model.compile or cfg.model.offload != "none":
        return nullcontext()
    return joint_cores(*models.values())


def narrower_than_rank(models: dict[str, nn.Module]) -> list[str]:
    """Modules whose smaller side is below the ``r`` that was asked for: all of it is adapted."""
    return [
        name
        for model in models.values()
        for name, layer in iter_nora_layers(model)
        if layer.r[NAME] < layer.nora_config[NAME].r
    ]


def fitted_factors(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Outer factors that no weight yields again, as named tensors for a checkpoint."""
    return {
        f"{component}.{name}.{part}": getattr(layer.outer(NAME), part)
        for component, model in models.items()
        for name, layer in iter_nora_layers(model)
        if layer.outer(NAME).spec.basis in DATA_BASES
        for part in ("outer_B", "outer_A", "singular_values")
    }


def restore_factors(models: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Inverse of ``fitted_factors``."""
    for component, model in models.items():
        for name, layer in iter_nora_layers(model):
            key = f"{component}.{name}."
            if key + "outer_A" in tensors:
                parts = [tensors[key + part] for part in ("outer_B", "outer_A", "singular_values")]
                layer.adopt_factors(NAME, Factors(*parts, fingerprint=layer.base_fingerprint()))


def move_adapters(model: nn.Module, device: torch.device) -> None:
    """Bring the adapters to a device that their base layers' weights are not on."""
    for _, layer in iter_nora_layers(model):
        for part in (layer.nora_inner_A, layer.nora_inner_B, layer.nora_outer):
            part.to(device)
        layer.nora_initial_A.to(device)
        layer.nora_initial_B.to(device)


def checkpoint_gradients(models: dict[str, nn.Module]) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # diffusers, transformers from 5.23 on, transformers before
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable")
    for model in models.values():
        known = (name for name in names if hasattr(model, name))
        getattr(model, next(known, "gradient_checkpointing_enable"))()


def add_adapter(component: str, model: Any, config: NoraConfig) -> None:
    """Add an adapter to one model.

    Raises:
        UserError: when no module matches ``adapter.target_modules``.
    """
    try:
        with warnings.catch_warnings():  # `narrower_than_rank` finds them, for the report
            ignore_lowered_ranks()
            if hasattr(model, "add_adapter"):
                model.add_adapter(config, NAME)
            else:  # diffusers has no such method on PixArt's transformer
                inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise UserError(
            f"adapter.target_modules = {sorted(config.target_modules or ())}: no module of the "
            f"{component} has such a name; give endings of module names, as in "
            '["to_q", "to_k"], or use adapter.targets'
        ) from error


def _load_start(source: str, family: Family, models: dict[str, nn.Module]) -> None:
    try:
        path = adapter_path(Path(source))
    except UserError as error:
        raise UserError(f'adapter.init_from = "{source}": {error}') from None
    load_adapter(family.components.pipeline, path, NAME)
    for name, model in family.components.text_encoders.items():
        if name not in models and any(True for _ in iter_nora_layers(model)):
            raise UserError(
                f'adapter.init_from = "{source}": it also adapts the {name}; '
                "set text_encoder.train = true to go on with both"
            )
    if not any(True for model in models.values() for _ in iter_nora_layers(model)):
        raise UserError(
            f'adapter.init_from = "{source}": this is a LoRA file; a run starts from a native NoRA '
            "file (adapter.safetensors)"
        )


def _check_start(source: str, component: str, model: nn.Module, wanted: NoraConfig) -> None:
    """What is loaded must be what the config describes, or the saved config would be untrue."""
    layers = dict(iter_nora_layers(model))
    given = next(iter(layers.values())).nora_config[NAME]
    fields = ["r", "inner_r", "scaling", "dropout", "init", "basis", "seed", "timestep_rank"]
    if "sigma" not in (given.init, wanted.init):  # P0 = 0 with both, and Q0 is of no account
        fields.remove("init")
    differing = [
        f"{name} = {getattr(given, name)!r} (here {getattr(wanted, name)!r})"
        for name in fields
        if getattr(given, name) != getattr(wanted, name)
    ]
    endings = tuple(f".{ending}" for ending in wanted.target_modules or ())
    matched = {
        name
        for name, module in adaptable_modules(model).items()
        if f".{name}".endswith(endings) and hasattr(module, "weight")
    }
    if matched != layers.keys():
        differing.append(f"{len(layers)} adapted modules (here {len(matched)})")
    if differing:
        section = "text_encoder" if component.startswith("text_encoder") else "adapter"
        raise UserError(
            f'adapter.init_from = "{source}": its {component} has {", ".join(differing)}; set the '
            f"keys of [{section}] to the file's values"
        )


def _fit_basis(cfg: DreamboothConfig, family: Family, inputs: Inputs) -> None:
    """Fit a data-driven basis on the run's own pictures, over many timesteps."""
    # Only the denoiser has one: its gradient ends at the conditioning.
    step = partial(subject_loss, cfg, family, inputs, encode=False)
    fit_basis(family.components.denoiser, range(FIT_BATCHES), step, NAME)


def fit_inner_pairs(
    cfg: DreamboothConfig,
    family: Family,
    inputs: Inputs,
    models: dict[str, nn.Module],
    batches: Iterable[int] = range(START_BATCHES),
) -> None:
    """Fit the start of the inner pairs of all models at once, where the config asks for that.

    The denoiser may be split over processes: as in a step, each gathers a block at a time.

    Args:
        cfg: the settings.
        family: the base model.
        inputs: what it is fitted to.
        models: by component, with their adapters in the initial state.
        batches: numbers of the batches.
    """
    if cfg.adapter.init != "gradient" or cfg.adapter.init_from is not None:
        return
    step = partial(subject_loss, cfg, family, inputs, encode=cfg.text_encoder.train)
    together = nn.ModuleList(models.values())
    with as_recomputed(together, cfg.train.gradient_checkpointing):
        fit_start(together, batches, step, NAME)


def subject_loss(
    cfg: DreamboothConfig, family: Family, inputs: Inputs, index: int, *, encode: bool
) -> Tensor:
    """The subject's loss on one batch, with noise of its own; ``encode``: by the text encoder."""
    generator = torch.Generator().manual_seed(derive_seed(cfg.train.seed, "basis", index))
    batch = inputs.batch(index, min(cfg.train.batch_size, len(inputs.dataset.items)))
    if encode:
        conditioning = family.encode_prompts([inputs.prompts[row] for row in batch.prompt_rows])
    else:
        conditioning = inputs.conditioning.select(batch.prompt_rows)
    conditioning = family.frame(conditioning, batch.framings)
    return family.loss(
        family.components.denoiser, batch.latents, conditioning, generator, mask=batch.mask
    ).mean()
