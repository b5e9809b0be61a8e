"""Plots of recorded comparisons."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nora_diffusion.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = (
    ("text_adapted", "text alignment (mini-CLIP score)", "linear"),
    ("trained_parameters", "trained parameters", "log"),
    ("file_bytes", "file, bytes (fp16)", "log"),
    ("step_cpu_s", "CPU seconds a step", "linear"),
)
_DIGIT_WIDTH, _HALF_HEIGHT, _MARKER = 9, 8, 4
"""Of the numbers at points and of the points, in px."""
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
    return _save(methods_figure(summary), path, summary)


def methods_figure(summary: Sequence[dict[str, Any]]) -> Figure:
    """The picture of ``plot_methods``: a number stands at each point, a legend says whose it is."""
    figure = _figure((13, 10.5))
    panels, key = figure.subplots(2, 2).flat, []
    points: dict[Axes, dict[int, tuple[float, float]]] = {axes: {} for axes in panels}
    for number, line in enumerate(summary, start=1):
        ours = line["method"].startswith("NoRA")
        looks = {"fmt": "o" if ours else "s", "color": _colour(ours), "markersize": 4}
        drawn = None
        for axes, (name, _, _) in zip(points, AXES, strict=True):
            if "gap_closed" not in line or line.get(name) is None:  # every run diverged; no time
                continue
            low, high = line["intervals"]["gap_closed"]
            gap = line["gap_closed"]
            bar = [[100 * (gap - low)], [100 * (high - gap)]]
            drawn = axes.errorbar(line[name], 100 * gap, bar, elinewidth=0.6, alpha=0.8, **looks)
            points[axes][number] = line[name], 100 * gap
        if drawn is not None:
            drawn.set_label(f"{number}  {line['method']}")
            key.append(drawn)
    for axes, (_, label, scale) in zip(points, AXES, strict=True):
        axes.set(xscale=scale, xlabel=label, ylabel="gap closed, %")
        axes.tick_params(axis="x", which="minor", labelsize=7)  # of a log scale: 3 · 10⁵, 4 · 10⁵
        axes.grid(alpha=0.3)
    figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.draw_without_rendering()  # the layout settles where the points lie
    for axes, found in points.items():
        _number(axes, found, [_colour(line["method"].startswith("NoRA")) for line in summary])
    return figure


def _colour(ours: bool) -> str:
    return "tab:red" if ours else "tab:blue"


def _number(axes: Axes, points: dict[int, tuple[float, float]], colours: Sequence[str]) -> None:
    """Put each point's number as near to it as no other number and no point is in the way."""
    places = {number: axes.transData.transform(at) for number, at in points.items()}
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in places.values()]
    scale = 72 / axes.figure.dpi
    for number, (x, y) in places.items():
        half = _DIGIT_WIDTH * len(str(number)) / 2
        for radius, angle in _around():
            middle_x, middle_y = x + radius * math.cos(angle), y + radius * math.sin(angle)
            box = (
                middle_x - half,
                middle_y - _HALF_HEIGHT,
                middle_x + half,
                middle_y + _HALF_HEIGHT,
            )
            inside = axes.bbox.contains(*box[:2]) and axes.bbox.contains(*box[2:])
            if inside and not any(_meet(box, other) for other in taken):
                break
        else:  # a panel this full has no free place
            middle_x, middle_y = x + 2 * half, y
            box = (middle_x - half, middle_y, middle_x + half, middle_y)
        taken.append(box)
        text = axes.annotate(
            str(number), points[number], textcoords="offset points",
            xytext=((middle_x - x) * scale, (middle_y - y) * scale), ha="center", va="center",
            fontsize=9, color=colours[number - 1],
            bbox={"boxstyle": "square,pad=0.05", "color": "white", "linewidth": 0, "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "color": colours[number - 1], "linewidth": 0.5},
        )  # fmt: skip
        text.set_in_layout(False)


def _around() -> Iterator[tuple[float, float]]:
    """Offsets from a point in px and radians: near ones first, beside its bar before across it."""
    for radius in range(13, 160, 6):
        for degrees in (20, -20, 160, -160, 50, -50, 130, -130, 0, 180):
            yield radius, math.radians(degrees)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart


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
    "others": ("summary", plot_methods),
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
