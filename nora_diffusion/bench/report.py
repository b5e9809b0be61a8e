"""``nora bench report``: the numbers in README, docs and model cards, from the recorded results.

A page marks the parts that are rendered::

    <!-- report: subject -->
    ...
    <!-- end of report -->

The part's template is ``benchmarks/report/subject.md`` (jinja2), where ``results("subject")`` is
what ``benchmarks/results/subject.json`` holds under "results", and ``record("subject")`` the whole.
A word after the name, as in ``<!-- report: dry_run sd15 -->``, is the template's ``which``.
The plots of ``PLOTS`` are drawn from the same results into ``docs/images``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from nora_diffusion.bench.plots import PLOTS, shows
from nora_diffusion.config import UserError
from nora_diffusion.disk import write_atomically

_PART = re.compile(
    r"(<!-- report: ([\w-]+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end of report -->)", re.DOTALL
)


def write_report(root: Path) -> list[Path]:
    """Render every marked part and plot anew; returns the files that changed.

    Raises:
        UserError: when a template or a result is missing.
    """
    changed: list[Path] = []
    pages = list(_pages(root))  # all before any is written: a later one may lack its result
    for page, text, rendered in pages:
        if text != rendered:
            write_atomically(page, rendered.encode())
            changed.append(page)
    for path, draw, content in _stale_plots(root):
        changed.append(draw(content, path))
    return changed


def check_report(root: Path) -> list[str]:
    """The parts and plots that do not say what the results say, as ``PAGE: PART``.

    Raises:
        UserError: when a template or a result is missing.
    """
    parts = [
        f"{page.relative_to(root)}: {old[2]}"
        for page, text, rendered in _pages(root)
        for old, new in zip(_PART.finditer(text), _PART.finditer(rendered), strict=True)
        if old[4] != new[4]
    ]
    return parts + [str(path.relative_to(root)) for path, _, _ in _stale_plots(root)]


def _stale_plots(root: Path) -> Iterator[tuple[Path, Callable[[Any, Path], Path], Any]]:
    """Plots that do not show the recorded numbers: where each belongs, what draws it, of what."""
    for name, (key, draw) in PLOTS.items():
        results = root / "benchmarks" / "results" / f"{name}.json"
        content = json.loads(results.read_bytes())["results"].get(key) if results.is_file() else []
        path = root / "docs" / "images" / f"bench-{name}.png"
        if content and not shows(path, content):
            yield path, draw, content


def _pages(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Every page with marked parts, as it is and as it should be."""
    if not (root / "benchmarks" / "report").is_dir():
        raise UserError(
            f"{root}: holds no benchmarks/report; run this in a checkout of the project"
        )
    environment = _environment(root)
    cards = sorted((root / "nora_diffusion" / "assets").glob("*/README.md"))
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md")), *cards):
        text = page.read_text(encoding="utf-8")
        if _PART.search(text):
            yield page, text, _PART.sub(partial(_rendered, environment, page), text)


def _rendered(environment: Environment, page: Path, part: re.Match[str]) -> str:
    try:
        text = environment.get_template(f"{part[2]}.md").render(which=part[3])
    except TemplateError as error:
        raise UserError(f"{page}: part {part[2]}: {type(error).__name__}: {error}") from error
    return f"{part[1]}{text.strip()}\n{part[5]}"


def _environment(root: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(root / "benchmarks" / "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def record(name: str) -> Any:
        path = root / "benchmarks" / "results" / f"{name}.json"
        try:
            return json.loads(path.read_bytes())
        except OSError:
            raise UserError(
                f"{path}: no such result; run the benchmark, or take the part out"
            ) from None

    environment.globals |= {"record": record, "results": lambda name: record(name)["results"]}
    environment.filters |= {"share": share, "aim": aim, "difference": difference}
    environment.filters |= {"beaten_by": beaten_by}
    return environment


def share(value: float, digits: int = 0) -> str:
    """0.19 as "19 %"; what rounds to nothing has no sign."""
    rounded = round(value, digits + 2) + 0.0
    return f"{rounded:.{digits}%}".replace("%", " %")


def aim(text: str, met: bool) -> str:
    """A number that missed its aim, as what it is."""
    return text if met else f"**{text}** (missed)"


def difference(against: dict[str, Any], other: str, key: str) -> str:
    """A line's difference to another method as "+0.012 (-0.003 to 0.027)"; "-" for itself."""
    if other not in against:
        return "-"
    found = against[other][key]
    return f"{found['mean']:+.3f} ({found['low']:.3f} to {found['high']:.3f})"


def beaten_by(summary: list[dict[str, Any]], name: str, axis: str) -> list[str]:
    """Methods at least as good as ``name`` in the gap closed and along another axis.

    None: it is on the Pareto front of the two. Of text alignment more is better, of costs less.
    """
    sign = 1 if axis == "text_adapted" else -1
    own = next(line for line in summary if line["method"] == name)
    return [
        line["method"]
        for line in summary
        if line is not own
        and line.get("gap_closed", float("-inf")) >= own["gap_closed"]
        and None not in (line.get(axis), own.get(axis))
        and sign * line[axis] >= sign * own[axis]
    ]
