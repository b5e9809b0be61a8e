"""Plots of recorded comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nora_diffusion.config import UserError

AXES = (
    ("text_adapted", "text alignment (mini-CLIP score)", "linear"),
    ("trained_parameters", "trained parameters", "log"),
    ("file_bytes", "file, bytes (fp16)", "log"),
    ("step_cpu_s", "CPU seconds a step", "linear"),
)


def plot_methods(summary: Sequence[dict[str, Any]], path: Path) -> Path:
    """Fidelity against alignment, parameters, file size and step time; one point a method.

    Args:
        summary: of ``nora bench methods``: lines with ``method``, ``gap_closed``, ``intervals`` and
            the keys of ``AXES``.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('plots need matplotlib: pip install "nora-diffusion[eval]"') from None
    figure = Figure(figsize=(13, 10), layout="constrained")
    # One colour and number a method, named once below: labels at the points would overlap.
    for axes, (key, label, scale) in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for number, line in enumerate(summary, start=1):
            low, high = line["intervals"]["gap_closed"]
            gap = line["gap_closed"]
            ours = line["method"].startswith("NoRA")
            colour = "tab:red" if ours else "tab:blue"
            axes.errorbar(
                line[key], 100 * gap, yerr=[[100 * (gap - low)], [100 * (high - gap)]],
                fmt="o" if ours else "s", color=colour, markersize=4, elinewidth=0.6, alpha=0.8,
            )  # fmt: skip
            axes.annotate(
                str(number), (line[key], 100 * gap), textcoords="offset points", xytext=(5, 4),
                fontsize=9, color=colour,
            )  # fmt: skip
        axes.set_xscale(scale)
        axes.set_xlabel(label)
        axes.set_ylabel("gap closed, %")
        axes.grid(alpha=0.3)
    names = [f"{number} {line['method']}" for number, line in enumerate(summary, start=1)]
    rows = [" · ".join(names[start : start + 4]) for start in range(0, len(names), 4)]
    figure.supxlabel("\n".join(rows), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
