"""Pictures of what an adapter moved, and of how two adapters overlap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nora_diffusion.config import UserError
from nora_diffusion.evaluation.inspection import DIRECTIONS, Inspection, Moved, Side, shortened
from nora_diffusion.evaluation.overlap import Overlap

_ROWS = 120
"""Modules on one heat map; a file with more makes several."""
_DECADES = 4
"""How far below the largest value the colours reach."""


def draw(found: Inspection, folder: Path) -> list[Path]:
    """Write `energy.png` and `directions.png` (`-2`, ... for more modules than fit one).

    Directions of different kinds, singular and random ones, stand in panels of their own.

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    files = [_save(pyplot, energy_figure(pyplot, found), folder / "energy.png")]
    largest = max(float(m.directions(s).max()) for m in found.modules for s in _sides()) or 1.0
    modules = [module for of_kind in found.kinds().values() for module in of_kind]
    for page, begin in enumerate(range(0, len(modules), _ROWS), start=1):
        name = "directions.png" if page == 1 else f"directions-{page}.png"
        rows = Inspection(found.path, found.base, modules[begin : begin + _ROWS])
        files.append(_save(pyplot, directions_figure(pyplot, rows, largest), folder / name))
    return files


def draw_overlap(overlap: Overlap, files: tuple[Path, Path], folder: Path) -> Path:
    """Write `overlap.png`.

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    pairs = overlap.pairs
    height = 1.6 + 0.17 * len(pairs)
    figure, axes = pyplot.subplots(
        1, 3, figsize=(12, height), sharey=True, layout="constrained", width_ratios=(2, 2, 1.4)
    )
    outputs, inputs = [p.output_angles for p in pairs], [p.input_angles for p in pairs]
    for axis, side, angles in ((axes[0], "output", outputs), (axes[1], "input", inputs)):
        for row, found in enumerate(angles):
            axis.scatter(found, [row] * len(found), s=14, color="tab:blue", alpha=0.6, linewidths=0)
            if found:
                axis.scatter(found[:1], [row], s=18, color="tab:red", linewidths=0)
        axis.set(xlim=(-3, 93), xlabel="degrees", title=f"principal angles, {side} directions")
        axis.grid(axis="x", alpha=0.3)
    cosines = [pair.cosine for pair in pairs]
    colours = ["tab:red" if cosine < 0 else "tab:blue" for cosine in cosines]
    axes[2].barh(range(len(pairs)), cosines, color=colours)
    limit = max(0.05, 1.1 * max(abs(c) for c in cosines))
    axes[2].set(xlim=(-limit, limit), xlabel="cosine", title="cosine of the two updates")
    axes[2].axvline(0, color="black", linewidth=0.8)
    _label_rows(axes[0], [pair.name for pair in pairs])
    axes[0].set_ylim(len(pairs) - 0.5, -0.5)
    first, second = overlap.interference
    figure.suptitle(
        f"A: {_told(files[0])}\nB: {_told(files[1])}\nred: smallest angle; predicted change of "
        f"A's own effect {first:+.2f}, of B's {second:+.2f}",
        fontsize=10,
    )
    return _save(pyplot, figure, folder / "overlap.png")


def energy_figure(pyplot: Any, found: Inspection) -> Any:
    """Shares by block and by projection, and by the number of each kind of direction."""
    blocks, projections, kinds = found.by("block"), found.by("projection"), found.kinds()
    height, panels = max(3.6, 1.2 + 0.2 * len(blocks)), 2 + len(kinds)
    figure, axes = pyplot.subplots(1, panels, figsize=(4.7 * panels, height), layout="constrained")
    for axis, title, energies in ((axes[0], "block", blocks), (axes[1], "projection", projections)):
        shares = [100 * energy / (found.energy or 1) for energy in energies.values()]
        bars = axis.barh(range(len(shares)), shares, color="tab:blue")
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        _label_rows(axis, list(energies), size=8)
        axis.invert_yaxis()
        axis.set(xlabel="% of the energy |ΔW|²", title=f"by {title}", xlim=(0, 1.15 * max(shares)))
    for axis, (kind, modules) in zip(axes[2:], kinds.items(), strict=True):
        word, index = DIRECTIONS[kind]
        for side, colour in zip(_sides(), ("tab:orange", "tab:green"), strict=True):
            shares = 100 * _summed(modules, side) / (found.energy or 1)
            style = "o" if kind == "random" else "-"  # a line would tell of an order
            axis.plot(shares, style, color=colour, markersize=3, label=f"{side} directions")
        axis.set(xlabel=index, ylabel="% of the energy", ylim=(0, None))
        axis.set_title(
            f"{word} directions of {len(modules)} modules, small ones with fewer", size=9
        )
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{_told(found.path)}: |ΔW| = {found.energy**0.5:.4g}", fontsize=10)
    return figure


def directions_figure(pyplot: Any, found: Inspection, largest: float) -> Any:
    """Heat maps of modules by direction, of outputs and of inputs; each kind has its own."""
    from matplotlib.colors import LogNorm

    kinds, count = found.kinds(), len(found.modules)
    height = 1.0 + 0.7 * len(kinds) + 0.17 * count
    figure, axes = pyplot.subplots(
        len(kinds), 2, figsize=(13, height), sharey="row", layout="constrained", squeeze=False,
        height_ratios=[len(modules) for modules in kinds.values()],
    )  # fmt: skip
    norm = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
    image = None
    for row, (kind, modules) in zip(axes, kinds.items(), strict=True):
        word, index = DIRECTIONS[kind]
        width = max(module.core.shape[0] for module in modules)
        for axis, side in zip(row, _sides(), strict=True):
            energies = np.full((len(modules), width), np.nan)
            for place, module in enumerate(modules):
                energies[place, : module.core.shape[0]] = module.directions(side).numpy()
            image = axis.imshow(
                energies + largest * 1e-12, norm=norm, aspect="auto", cmap="magma",
                interpolation="none",
            )  # fmt: skip
            axis.set_title(f"{word} {side} directions")
            axis.set_xlabel(index)
        _label_rows(row[0], [module.name for module in modules])
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / (0.17 * count + 1)), pad=0.01)
    bar.set_label("energy of ΔW in the direction (log scale; darkest: that or less)")
    figure.suptitle(f"{_told(found.path)}: which directions of each weight moved", fontsize=10)
    return figure


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _told(path: Path) -> str:
    """A file by its name and that of its folder, which names a run."""
    return f"{path.parent.name}/{path.name}"


def _summed(modules: Sequence[Moved], side: Side) -> np.ndarray:
    total = np.zeros(max(module.core.shape[0] for module in modules))
    for module in modules:
        total[: module.core.shape[0]] += module.directions(side).numpy()
    return total


def _label_rows(axis: Any, names: Sequence[str], size: float = 7) -> None:
    axis.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=size)


def _sides() -> tuple[Side, Side]:
    return "output", "input"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            'pictures need matplotlib; run: pip install "nora-diffusion[eval]", or leave out --out '
            "for the numbers alone"
        ) from error
    matplotlib.use("Agg")  # files only, whatever screen there is
    from matplotlib import pyplot

    return pyplot
