"""Pictures of what an adapter moved, and of how two adapters overlap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nora_diffusion.config import UserError
from nora_diffusion.evaluation.inspection import Inspection, Moved, Side, shortened
from nora_diffusion.evaluation.overlap import Overlap

_ROWS = 120
"""Modules on one heat map; a file with more makes several."""
_DECADES = 4
"""How far below the largest value the colours reach."""


def draw(found: Inspection, folder: Path) -> list[Path]:
    """Write `energy.png` and `directions.png` (`-2`, ... for more modules than fit one).

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    files = [_energy(pyplot, found, folder / "energy.png")]
    largest = max(float(m.directions(s).max()) for m in found.modules for s in _sides()) or 1.0
    for page, begin in enumerate(range(0, len(found.modules), _ROWS), start=1):
        name = "directions.png" if page == 1 else f"directions-{page}.png"
        rows = found.modules[begin : begin + _ROWS]
        files.append(_directions(pyplot, rows, largest, found.path, folder / name))
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
    path = folder / "overlap.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _energy(pyplot: Any, found: Inspection, path: Path) -> Path:
    """Shares by block and by projection, and by singular index."""
    blocks, projections = found.by("block"), found.by("projection")
    height = max(3.6, 1.2 + 0.2 * len(blocks))
    figure, axes = pyplot.subplots(1, 3, figsize=(14, height), layout="constrained")
    for axis, title, energies in ((axes[0], "block", blocks), (axes[1], "projection", projections)):
        shares = [100 * energy / (found.energy or 1) for energy in energies.values()]
        bars = axis.barh(range(len(shares)), shares, color="tab:blue")
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        _label_rows(axis, list(energies), size=8)
        axis.invert_yaxis()
        axis.set(xlabel="% of the energy |ΔW|²", title=f"by {title}", xlim=(0, 1.15 * max(shares)))
    for side, colour in zip(_sides(), ("tab:orange", "tab:green"), strict=True):
        shares = 100 * _summed(found.modules, side) / (found.energy or 1)
        axes[2].plot(np.arange(len(shares)), shares, color=colour, label=f"{side} directions")
    axes[2].set(
        xlabel="singular index (0: the weight's largest)",
        ylabel="% of the energy",
        title="by singular index (small modules have fewer)",
    )
    axes[2].legend()
    axes[2].grid(alpha=0.3)
    figure.suptitle(f"{_told(found.path)}: |ΔW| = {found.energy**0.5:.4g}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _directions(
    pyplot: Any, rows: Sequence[Moved], largest: float, source: Path, path: Path
) -> Path:
    """Heat maps of modules by singular index, for output and input directions."""
    from matplotlib.colors import LogNorm

    width = max(module.core.shape[0] for module in rows)
    figure, axes = pyplot.subplots(
        1, 2, figsize=(13, 1.7 + 0.17 * len(rows)), sharey=True, layout="constrained"
    )
    norm = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
    image = None
    for axis, side in zip(axes, _sides(), strict=True):
        energies = np.full((len(rows), width), np.nan)
        for place, module in enumerate(rows):
            energies[place, : module.core.shape[0]] = module.directions(side).numpy()
        image = axis.imshow(
            energies + largest * 1e-12, norm=norm, aspect="auto", cmap="magma", interpolation="none"
        )
        axis.set_title(f"{side} directions")
        axis.set_xlabel("singular index (0: the weight's largest)")
    _label_rows(axes[0], [module.name for module in rows])
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / (0.17 * len(rows) + 1)), pad=0.01)
    bar.set_label("energy of ΔW in the direction (log scale; darkest: that or less)")
    figure.suptitle(f"{_told(source)}: which singular directions of each weight moved", fontsize=10)
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
