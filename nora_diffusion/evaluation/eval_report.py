"""What ``nora eval`` writes: a Markdown table, and one page with the numbers and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nora_diffusion.disk import write_atomically

HEADER = ("score", "base", "adapted", "ceiling", "gap closed")


def write_report(
    out: Path, results: dict[str, Any], prompts: Sequence[str], names: dict[str, list[list[str]]]
) -> Path:
    """Write ``eval.md`` and ``index.html``; returns the page.

    Args:
        out: the folder, which holds the pictures.
        results: as in ``eval.json``.
        prompts: as drawn, with placeholders.
        names: for each kind and prompt the files of its pictures, from ``out``.
    """
    rows = [row for found in results["backends"] for row in score_rows(found)]
    write_atomically(out / "eval.md", markdown(results, rows).encode())
    environment = Environment(
        loader=PackageLoader("nora_diffusion.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("eval.html").render(
        results=results, header=HEADER, rows=rows, prompts=prompts, names=names
    )
    write_atomically(out / "index.html", page.encode())
    return out / "index.html"


def score_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The numbers of one backend as lines of a table, the backend's name in each."""
    name = found["backend"]
    lines: list[tuple[str, ...]] = []
    for key, title in (("held_out", "held-out photos"), ("training", "training photos")):
        if key in found:
            one = found[key]
            values = (_number(one["base"]), _number(one["adapted"]), _number(one["ceiling"]))
            lines.append((f"{name}: cosine to the {title}", *values, _share(one["gap_closed"])))
    if "text" in found:
        text = found["text"]
        values = (_number(text["base"]), _number(text["adapted"]))
        lines.append((f"{name}: cosine to the prompt's text", *values, "-", "-"))
    if "diversity" in found:
        one = found["diversity"]
        values = (_number(one["base"]), _number(one["adapted"]), _number(one["photos"]))
        lines.append((f"{name}: diversity, 1 - cosine in a prompt", *values, "-"))
        one = found["drift"]
        lines.append(
            (f"{name}: class without trigger, 1 - cosine to the base's", "0", _number(one["moved"]))
            + ("-", "-")
        )
        nearer = f"{name}: class without trigger, nearer to the subject by"
        lines.append((nearer, "0", _number(one["nearer_to_subject"]), "-", "-"))
    return lines


def markdown(results: dict[str, Any], rows: Sequence[tuple[str, ...]]) -> str:
    """The table with what it was measured on."""
    lines = [
        f"# {results['trigger']} {results['class_name']}",
        "",
        f"{results['prompts']} prompts x {results['n']} pictures from seed {results['seed']}, "
        f"{results['steps']} steps, guidance {results['guidance']:g}; base {results['base']} "
        f"({(results['base_hash'] or 'hash unknown')[:12]}), adapter {results['adapter'][:12]}; "
        f"{results['training_photos']} "
        f"training photos, {results['held_out_photos']} held out.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|" + "---|" * len(HEADER),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
