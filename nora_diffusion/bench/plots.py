"""Plots of recorded comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nora_diffusion.config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = (
    ("text_adapted", "text alignment (mini-CLIP score)", "linear"),
    ("trained_parameters", "trained parameters", "log"),
    ("file_bytes", "file, bytes (fp16)", "log"),
    ("step_cpu_s", "CPU seconds a step", "linear"),
)
_SOURCE = "Source"  # PNG's own key for where a picture comes from


def plot_methods(summary: Sequence[dict[str, Any]], path: Path) -> Path:
    """Fidelity against alignment, parameters, file size and step time; one point a method.

    Args:
        summary: of ``nora bench methods``: lines with ``method``, ``gap_closed``, ``intervals`` and
            the keys of ``AXES``.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing.
    """
    figure = _figure((13, 10))
    # One colour and number a method, named once below: labels at the points would overlap.
    for axes, (key, label, scale) in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for number, line in enumerate(summary, start=1):
            if "gap_closed" not in line or line.get(key) is None:  # every run diverged; no time
                continue
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
    return _save(figure, path, summary)


def plot_ranks(cells: Sequence[dict[str, Any]], path: Path) -> Path:
    """A map of the score for each subject, outer rank against inner rank.

    Args:
        cells: of ``nora bench ranks``: ``subject``, ``r``, ``inner_r``, ``score``.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing.
    """
    subjects = list(dict.fromkeys(cell["subject"] for cell in cells))
    outer, inner = (sorted({cell[key] for cell in cells}) for key in ("r", "inner_r"))
    figure = _figure((4.4 * len(subjects), 4.2))
    for axes, subject in zip(
        figure.subplots(1, len(subjects), squeeze=False).flat, subjects, strict=True
    ):
        of_pair = {
            (cell["r"], cell["inner_r"]): cell["score"]
            for cell in cells
            if cell["subject"] == subject
        }
        rows = [[of_pair.get((r, k), float("nan")) for r in outer] for k in inner]
        axes.imshow(rows, origin="lower", cmap="viridis", aspect="auto")
        low, high = min(of_pair.values()), max(of_pair.values())
        for (r, k), score in of_pair.items():
            dark = score < (low + high) / 2
            axes.text(
                outer.index(r), inner.index(k), f"{score:.2f}", ha="center", va="center",
                fontsize=9, color="white" if dark else "black",
            )  # fmt: skip
        axes.set_xticks(range(len(outer)), map(str, outer))
        axes.set_yticks(range(len(inner)), map(str, inner))
        axes.set_xlabel("outer rank r")
        axes.set_ylabel("inner rank")
        axes.set_title(subject)
    return _save(figure, path, cells)


PLOTS: dict[str, tuple[str, Callable[[Sequence[dict[str, Any]], Path], Path]]] = {
    "methods": ("summary", plot_methods),
    "ablation": ("summary", plot_methods),
    "longer": ("summary", plot_methods),
    "ranks": ("cells", plot_ranks),
}
"""The plot of each comparison, and what of its results it shows."""


def shows(path: Path, content: Sequence[dict[str, Any]]) -> bool:
    """Whether the picture was drawn from these very numbers."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get(_SOURCE) == _digest(content)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('plots need matplotlib: pip install "nora-diffusion[eval]"') from None
    return Figure(figsize=size, layout="constrained")


def _save(figure: Figure, path: Path, content: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={_SOURCE: _digest(content)})
    return path


def _digest(content: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
