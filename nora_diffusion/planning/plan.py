"""What LoRA, LoRA-XS and NoRA would cost on one model: numbers, bytes and operations."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nora_diffusion.adapter import factorise
from nora_diffusion.adapter.factors import factorise_flops
from nora_diffusion.families.base import DTYPES
from nora_diffusion.planning.methods import TRAINED_BYTES, Counted, Method, adapted, count, methods
from nora_diffusion.planning.steps import StepBytes, inputs_of, run_step
from nora_diffusion.targets import (
    Choice,
    Target,
    check_ranks,
    choices_of,
    find_targets,
    parse_targets,
)
from nora_diffusion.train.live_memory import bytes_of

_CALIBRATION = 2048
"""Largest side of the weight that is factorised to see how fast this machine is."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        targets: as of `nora targets`.
        r: NoRA's outer rank.
        inner_r: NoRA's inner rank.
        lora_r: LoRA's rank.
        lora_xs_r: LoRA-XS's rank; None: that with about NoRA's trained numbers.
        dtype: number format of the frozen model.
        batch: samples a step.
        tokens: of each text, for language models.
        resolution_px: side of the pictures, for diffusion models; None: the model's own.
    """

    targets: Sequence[str] = ("attention",)
    r: int = 64
    inner_r: int = 8
    lora_r: int = 16
    lora_xs_r: int | None = None
    dtype: str = "bf16"
    batch: int = 1
    tokens: int = 512
    resolution_px: int | None = None


@dataclass(frozen=True)
class Row:
    """One method on the model.

    Attributes:
        method: which.
        counted: numbers and bytes of its layers.
        optimizer_bytes: AdamW's two means.
        step: bytes of a training step, or why they are not known.
        training_bytes: weights, factors, trained numbers with gradient and state, and the step's
            peak; None where the step is not known.
    """

    method: Method
    counted: Counted
    optimizer_bytes: int
    step: StepBytes | str
    training_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What a model is, and what each method would cost on it.

    Attributes:
        source: as the user named it.
        choice: the part and the modules that are adapted.
        dtype: number format of the frozen model.
        parameters: numbers in the model.
        weight_bytes: its parameters and buffers.
        targets: the adapted modules.
        not_adapted: parameters of three and more dimensions outside convolutions (fused experts):
            ending of the name to how many there are and their numbers.
        factorise_flops: of the outer factors by `basis="weight"`, once.
        factorise_bytes: of the largest weight in float64: a core that factorises holds one.
        size: of a step, in words; or why no step is counted.
        rows: the methods.
    """

    source: str
    choice: str
    dtype: str
    parameters: int
    weight_bytes: int
    targets: list[Target]
    not_adapted: dict[str, tuple[int, int]]
    factorise_flops: float
    factorise_bytes: int
    size: str
    rows: list[Row]


@dataclass(frozen=True)
class Speed:
    """How fast this machine factorised a small weight just now.

    Attributes:
        flops: operations a second of one core, in float64.
        cores: that would be used.
    """

    flops: float
    cores: int

    def seconds(self, flops: float) -> float:
        """Estimate for a factorisation of many weights."""
        return flops / (self.flops * self.cores)


def make_plan(source: str, asked: Request) -> Plan:
    """Plan all methods on one model, without loading weights.

    Raises:
        UserError: there is no such model, nothing in it fits the targets, or the inner rank is
            above the outer one.
    """
    check_ranks(asked.r, asked.inner_r)
    given = parse_targets(asked.targets)
    (choice,) = choices_of(source, given, DTYPES[asked.dtype])
    choice.model.requires_grad_(False)
    targets = find_targets(choice, asked.r, asked.inner_r)
    weights = bytes_of([*choice.model.parameters(), *choice.model.buffers()])
    inputs = inputs_of(choice, asked.batch, asked.tokens, asked.resolution_px)
    rows: list[Row] = []
    for method in methods(targets, asked.r, asked.inner_r, asked.lora_r, asked.lora_xs_r):
        with adapted(choice, targets, method):
            counted = count(choice, method)
            step = inputs if isinstance(inputs, str) else run_step(choice.model, inputs)
        state = 2 * TRAINED_BYTES * counted.trained
        training = None
        if isinstance(step, StepBytes):
            trained = 2 * TRAINED_BYTES * counted.trained
            training = weights + counted.outer_bytes + trained + state + step.peak
        rows.append(Row(method, counted, state, step, training))
    return Plan(
        source=source,
        choice=choice.name,
        dtype=asked.dtype,
        parameters=sum(p.numel() for p in choice.model.parameters()),
        weight_bytes=weights,
        targets=targets,
        not_adapted=_not_adapted(choice),
        factorise_flops=sum(factorise_flops(*target.shape, asked.r) for target in targets),
        factorise_bytes=max(8 * rows * columns for rows, columns in (t.shape for t in targets)),
        size=inputs if isinstance(inputs, str) else inputs.size,
        rows=rows,
    )


def measure_speed(plan: Plan) -> Speed:
    """Factorise one random weight on one core: of the shape with most of the work, if not larger.

    The rate depends on the shape: it is several times lower where all weights are small.
    """
    r = plan.rows[-1].method.r
    work: dict[tuple[int, int], float] = defaultdict(float)
    for target in plan.targets:
        work[target.shape] += factorise_flops(*target.shape, r)
    rows, columns = (min(side, _CALIBRATION) for side in max(work, key=lambda shape: work[shape]))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()  # other programs use the same cores
        factorise(weight, r, use_cache=False)
        elapsed = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Speed(factorise_flops(rows, columns, r) / elapsed, cores or 1)


def _not_adapted(choice: Choice) -> dict[str, tuple[int, int]]:
    """Fused weights, of experts for one, in which there is no linear layer to adapt."""
    found: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for name, module in choice.model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3:
                ending = ".".join([*name.split(".")[-2:], own])
                found[ending] += 1
                numbers[ending] += parameter.numel()
    return {ending: (found[ending], numbers[ending]) for ending in found}
