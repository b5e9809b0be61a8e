"""A plan as text for people, as a row of a table, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from nora_diffusion.planning.plan import Plan, Row, Speed
from nora_diffusion.planning.steps import StepBytes

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))

HEAD = (
    "model", "parameters", "modules", "trained: LoRA", "NoRA", "file, fp16: LoRA", "NoRA",
    "outer factors", "factorise", "AdamW: LoRA", "NoRA", "training: LoRA", "LoRA-XS", "NoRA",
)  # fmt: skip
"""Columns of the table of several models."""


def lines(plan: Plan, speed: Speed) -> Iterator[str]:
    """Describe one plan."""
    covered = sum(rows * columns for rows, columns in (t.shape for t in plan.targets))
    yield (
        f"{plan.source}: {plan.choice}: {len(plan.targets)} modules with "
        f"{_percent(covered, plan.parameters)} of {plan.parameters:,} parameters"
    )
    yield f"weights, {plan.dtype}: {amount(plan.weight_bytes)}"
    for ending, (found, numbers) in plan.not_adapted.items():
        yield (
            f"not adapted: {ending} ({found} fused parameters, {_percent(numbers, plan.parameters)}"
            " of the model): these methods adapt linear layers, and there is none in it"
        )
    table = [["", *(str(row.method) for row in plan.rows)]]
    for label, cells in _cells(plan, speed):
        table.append([label, *cells])
    widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
    for label, *cells in table:
        shown = (f"{cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))
        yield "  ".join([f"  {label:{widths[0]}}", *shown])
    yield from _notes(plan, speed)


def row(plan: Plan) -> str:
    """One line of the table of several models, in Markdown."""
    lora, xs, nora = plan.rows
    cells = [
        plan.source,
        f"{plan.parameters:,}",
        str(len(plan.targets)),
        *(f"{r.counted.trained:,}" for r in (lora, nora)),
        *(amount(r.counted.file_bytes["fp16"]) for r in (lora, nora)),
        amount(nora.counted.outer_bytes),
        _flop(plan.factorise_flops),
        *(amount(r.optimizer_bytes) for r in (lora, nora)),
        *(_known(r.training_bytes) for r in (lora, xs, nora)),
    ]
    return f"| {' | '.join(cells)} |"


def head() -> list[str]:
    """The first two lines of the table of several models."""
    return [f"| {' | '.join(HEAD)} |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]


def as_json(plan: Plan, speed: Speed) -> dict[str, Any]:
    """Every number of a plan, with bytes as whole numbers."""
    found = dataclasses.asdict(plan)
    found["factorise_seconds_estimate"] = speed.seconds(plan.factorise_flops)
    found["factorise_cores"] = speed.cores
    return found


def amount(size: float) -> str:
    """Bytes in the largest decimal unit of which there is one, with three digits."""
    if not size:
        return "0"
    unit, name = next((unit, name) for unit, name in _UNITS if size >= 0.9995 * unit)
    return f"{_three(size / unit)} {name}"


def _cells(plan: Plan, speed: Speed) -> Iterator[tuple[str, Sequence[str]]]:
    rows = plan.rows
    marks = [" (1)" if row.method.name == "LoRA-XS" else "" for row in rows]
    yield "trained parameters", [f"{row.counted.trained:,}" for row in rows]
    yield "  of the model", [_percent(row.counted.trained, plan.parameters) for row in rows]
    for kind in ("fp16", "fp32"):
        sizes = (amount(row.counted.file_bytes[kind]) for row in rows)
        yield (
            f"adapter file, {kind}",
            [size + mark for size, mark in zip(sizes, marks, strict=True)],
        )
    yield "as a LoRA file, fp16", [amount(row.counted.lora_bytes["fp16"]) for row in rows]
    yield "outer factors", [amount(row.counted.outer_bytes) for row in rows]
    once = [_flop(plan.factorise_flops), _duration(speed.seconds(plan.factorise_flops))]
    nora = rows[-1].method.name
    yield "factorisation, once", [" ".join(once) if r.method.name == nora else "-" for r in rows]
    yield "optimiser state (AdamW)", [amount(row.optimizer_bytes) for row in rows]
    yield "kept for backward", [_kept(row) for row in rows]
    yield "training memory", [_known(row.training_bytes) for row in rows]


def _notes(plan: Plan, speed: Speed) -> Iterator[str]:
    known = all(isinstance(row.step, StepBytes) for row in plan.rows)
    if known:
        yield f"  a step: {plan.size}; no gradient checkpointing"
    else:
        reasons = dict.fromkeys(row.step for row in plan.rows if isinstance(row.step, str))
        yield f"  a step is unknown: {'; '.join(reasons)}"
    for row in plan.rows:
        narrow = [t.name for t in plan.targets if min(t.shape) < row.method.r]
        if narrow and row.method.name != "LoRA":  # whose rank may be above a weight's
            yield (
                f"  {len(narrow)} of {len(plan.targets)} modules are narrower than r "
                f"{row.method.r} of {row.method.name}, e.g. {narrow[0]}: their numbers are those "
                "of the rank that they have"
            )
    yield (
        f"  factorisation time: an estimate for {speed.cores} core(s) of this machine, from one "
        f"weight at {speed.flops / 1e9:.1f} GFLOP/s; a core holds up to "
        f"{amount(plan.factorise_bytes)} (a weight in float64)"
    )
    yield "  (1) the trained numbers alone: no program has a file format for it"
    yield (
        "  training memory: weights, outer factors, the trained numbers with gradient and state in "
        "float32, and the most a step holds; this part of the model alone"
    )


def _kept(row: Row) -> str:
    return amount(row.step.kept) if isinstance(row.step, StepBytes) else "unknown"


def _known(size: int | None) -> str:
    return "unknown" if size is None else amount(size)


def _percent(part: int, whole: int) -> str:
    return f"{_three(100 * part / whole)} %"


def _three(value: float) -> str:
    """Three digits, and never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}" if value else "0"


def _flop(flops: float) -> str:
    return f"{_three(flops / 1e12)} TFLOP"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"~{_three(seconds)} s"
    return f"~{_three(seconds / 60)} min" if seconds < 7200 else f"~{_three(seconds / 3600)} h"
