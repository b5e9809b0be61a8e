"""``nora inspect``: prints what an adapter moved or how two overlap, and writes files of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nora_diffusion.config import UserError
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.inspection import DIRECTIONS, Inspection, inspect, shortened
from nora_diffusion.evaluation.overlap import Overlap, compare

_TOP = 10


def show(args: argparse.Namespace) -> int:
    """Inspect what the command line asks for; returns the exit code."""
    found = inspect(args.source, args.base)
    if args.other is None:
        lines, numbers = list(summary(found)), as_json(found)
    else:
        other = inspect(args.other, args.base)
        overlap = compare(found, other)
        measured = _measure(found, other, args.base)
        lines = list(overlap_summary(found, other, overlap, measured))
        numbers = overlap_json(found, other, overlap, measured)
    print("\n".join(lines))
    if args.out is None:
        return 0
    from nora_diffusion.evaluation.inspection_pictures import draw, draw_overlap

    folder = Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if args.other is None:
        files, name = draw(found, folder), "inspection.json"
    else:
        files = [draw_overlap(overlap, (found.path, other.path), folder)]
        name = "overlap.json"
    write_atomically(folder / name, (json.dumps(numbers, indent=1) + "\n").encode())
    print("\n".join(str(file) for file in (*files, folder / name)))
    return 0


def summary(found: Inspection) -> Iterator[str]:
    """What one adapter moved, for people."""
    yield f"{found.path}: {len(found.modules)} modules, |dW| = {found.energy**0.5:.4g}"
    if not found.energy:
        yield "  nothing moved: every core is zero"
        return
    for attribute in ("block", "projection"):
        yield f"energy by {attribute}:"
        energies = found.by(attribute)
        width = max(map(len, energies))
        for name, energy in energies.items():
            yield f"  {name:{width}}  {100 * energy / found.energy:5.1f} %"
    top = found.top(_TOP)
    words = {kind: DIRECTIONS[kind] for kind in dict.fromkeys(entry["basis"] for entry in top)}
    yield f"top directions ({'; '.join(index for _, index in words.values())}):"
    width = max(len(shortened(entry["module"])) for entry in top)
    wide = max(len(word) for word, _ in words.values())
    for entry in top:
        yield (
            f"  {shortened(entry['module']):{width}}  {entry['side']:6}  "
            f"{words[entry['basis']][0]:{wide}}  {entry['index']:4}  {100 * entry['share']:5.1f} %"
        )
    sizes = {m.name: m.relative_size for m in found.modules if m.relative_size is not None}
    if sizes:
        most = sorted(sizes, key=lambda name: -sizes[name])[:_TOP]
        yield "largest changes against their weights, |dW| / |W|:"
        yield from (f"  {shortened(name):{width}}  {100 * sizes[name]:7.3f} %" for name in most)


def as_json(found: Inspection) -> dict[str, Any]:
    """Every number of an inspection."""
    whole = found.energy or 1.0
    return {
        "file": str(found.path),
        "base": found.base,
        "energy": found.energy,
        "share_by_block": {k: v / whole for k, v in found.by("block").items()},
        "share_by_projection": {k: v / whole for k, v in found.by("projection").items()},
        "top_directions": found.top(_TOP),
        "modules": [
            {
                "name": module.name,
                "block": module.block,
                "projection": module.projection,
                "basis": module.kind,
                "energy": module.energy,
                "relative_size": module.relative_size,
                "effective_rank": module.effective_rank,
                "energy_by_output_direction": module.directions("output").tolist(),
                "energy_by_input_direction": module.directions("input").tolist(),
            }
            for module in found.modules
        ],
    }


def overlap_summary(
    first: Inspection,
    second: Inspection,
    overlap: Overlap,
    measured: tuple[float, float] | None,
) -> Iterator[str]:
    """How two adapters overlap, for people."""
    yield f"A: {first.path}: {len(first.modules)} modules, |dA| = {first.energy**0.5:.4g}"
    yield f"B: {second.path}: {len(second.modules)} modules, |dB| = {second.energy**0.5:.4g}"
    yield f"modules in both: {len(overlap.pairs)}"
    yield f"cosine of the updates: {overlap.cosine:+.3f}"
    yield f"share of B in the directions of A: {100 * overlap.shared:.1f} %"
    yield "change of each one's own effect when blended (0: none, 1: doubled, -1: undone):"
    first_one, second_one = overlap.interference
    yield f"  predicted  A {first_one:+.3f}  B {second_one:+.3f}"
    if measured is not None:
        yield f"  measured   A {measured[0]:+.3f}  B {measured[1]:+.3f}"
    yield "modules that agree or oppose most (cosine, smallest angle of outputs and of inputs):"
    most = sorted(overlap.pairs, key=lambda pair: -abs(pair.inner))[:_TOP]
    width = max(len(shortened(pair.name)) for pair in most)
    for pair in most:
        sides = (pair.output_angles, pair.input_angles)
        angles = (f"{found[0]:5.1f}°" if found else "    -" for found in sides)
        yield f"  {shortened(pair.name):{width}}  {pair.cosine:+.3f}  {'  '.join(angles)}"


def overlap_json(
    first: Inspection,
    second: Inspection,
    overlap: Overlap,
    measured: tuple[float, float] | None,
) -> dict[str, Any]:
    """Every number of a comparison."""
    return {
        "files": [str(first.path), str(second.path)],
        "energies": overlap.energies,
        "cosine": overlap.cosine,
        "shared": overlap.shared,
        "predicted_interference": overlap.interference,
        "measured_interference": measured,
        "modules": [
            {
                "name": pair.name,
                "block": pair.block,
                "cosine": pair.cosine,
                "shared": pair.shared,
                "output_angles_degrees": pair.output_angles,
                "input_angles_degrees": pair.input_angles,
            }
            for pair in overlap.pairs
        ],
    }


def _measure(first: Inspection, second: Inspection, base: str | None) -> tuple[float, float] | None:
    """On the base that was given, if it is a diffusion model's."""
    denoiser = any(m.name.startswith(("unet.", "transformer.")) for m in first.modules)
    if base is None or not denoiser:
        return None
    from nora_diffusion.adapter.header import AdapterFileError
    from nora_diffusion.evaluation.interference import measure_interference

    try:
        return measure_interference(first.path, second.path, base)
    except AdapterFileError as error:
        raise UserError(str(error)) from error
