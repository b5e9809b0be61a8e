"""How a run is shown: its state, its loss, its newest picture. Texts of users are escaped here."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from webui.forecast import Forecast
from webui.jobs import JobView
from webui.messages import as_text

SHEET_PX = 1024
"""Longest side of a picture on the page; the file itself stays as it is."""

WORDS = {
    "queued": "Queued",
    "running": "Running",
    "stopping": "Stopping",
    "stopped": "Stopped",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "done": "Done",
}


def duration(seconds: float) -> str:
    """A time span in words, of two units at most."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listed(job: JobView, place: int) -> str:
    """A line for a run in a list.

    Args:
        job: the run.
        place: among the queued ones, from 1; 0 where it is not queued.
    """
    state = f"{place}. in the queue" if place else WORDS[job.state].lower()
    begun = time.strftime("%d %b %H:%M", time.localtime(job.created_at))
    return f"{job.name} on {Path(job.base).name or job.base}, {begun}: {state}"


def status_html(job: JobView | None) -> str:
    """State, progress bar and sentence of a run."""
    if job is None:
        return (
            '<div class="run-empty"><strong>No run yet.</strong><p>Choose a subject and a base '
            "model, then start: progress, loss and samples appear here.</p></div>"
        )
    facts = [f"step {job.step} of {job.steps if job.steps is not None else '?'}"]
    if job.eta_s is not None and job.step < (job.steps or 0):
        facts.append(f"about {duration(job.eta_s)} left")
    if job.loss is not None:
        facts.append(f"loss {job.loss:.4f}")
    bar = f'<progress max="{job.steps or 1}" value="{job.step}" aria-label="Training steps done">'
    tone = "alert" if job.state == "failed" else "status"
    return (
        f'<div class="run run-{job.state}"><div class="run-head"><strong>{as_text(job.name)}'
        f'</strong> on {as_text(job.base)}<span class="run-state">{WORDS[job.state]}</span></div>'
        f"{bar}</progress><div class=run-facts>{' · '.join(facts)}</div>"
        f'<p role="{tone}">{as_text(job.message)}</p></div>'
    )


def loss_svg(points: Sequence[tuple[int, float]], steps: int | None) -> str:
    """The loss over the steps as a picture; nothing before there are two points."""
    if len(points) < 2:
        return ""
    width, height, left, bottom, top = 560, 200, 48, 24, 10
    last = max(steps or 0, points[-1][0])
    high = max(loss for _, loss in points) * 1.05 or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 10) * step / last
        return x, height - bottom - (height - bottom - top) * loss / high

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    smooth = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in _smoothed(points)))
    grid = ""
    for share in (0.0, 0.5, 1.0):
        y = place(0, high * share)[1]
        grid += (
            f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{high * share:.2f}</text>'
        )
    for step, anchor in ((0, "start"), (last, "end")):
        x = place(step, 0)[0]
        grid += f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{step}</text>'
    told = f"Loss from {points[0][1]:.3f} at step {points[0][0]} to {points[-1][1]:.3f} at step "
    told += str(points[-1][0])
    return (
        f'<figure class="loss"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
        f'<title>{told}</title>{grid}<polyline class="raw" points="{line}"/>'
        f'<polyline class="smooth" points="{smooth}"/></svg>'
        "<figcaption>Loss over steps; the thick line is its running mean.</figcaption></figure>"
    )


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    mean = points[0][1]
    smooth: list[tuple[int, float]] = []
    for count, (step, loss) in enumerate(points, start=1):
        mean += max(0.15, 1 / count) * (loss - mean)
        smooth.append((step, mean))
    return smooth


def sheet_html(job: JobView | None) -> str:
    """The newest picture of a run."""
    if job is None or job.sheet is None:
        return ""
    try:
        with Image.open(job.sheet) as image:
            image.thumbnail((SHEET_PX, SHEET_PX))
            data = io.BytesIO()
            image.convert("RGB").save(data, "JPEG", quality=88)
    except OSError:  # being written
        return ""
    what = "photos, base and adapted" if job.sheet.stem == "before_after" else "samples"
    told = f"{as_text(job.name)}: {what}, at step {job.step}"
    source = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure class="sheet"><img alt="{told}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{told}</figcaption></figure>"
    )


def forecast_html(forecast: Forecast | None, steps: int, problem: str = "") -> str:
    """Predicted memory and time, or why there are none."""
    if problem:
        return f'<div class="forecast problem" role="alert">{as_text(problem)}</div>'
    if forecast is None:
        return ""
    if not forecast.ready:
        return '<div class="forecast">Predicts memory and time ...</div>'
    parts: list[str] = []
    if forecast.memory:
        head, *more = (as_text(line) for line in forecast.memory)
        parts.append(
            f"<details><summary>{head[0].upper()}{head[1:]}</summary><pre>"
            + "\n".join(more)
            + "</pre></details>"
        )
    if forecast.step_s is not None:
        total = duration(forecast.step_s * steps)
        parts.append(
            f"<p>Predicted time: about {total} for {steps} steps of {forecast.step_s:.2g} s. "
            f"{as_text(forecast.origin)} Loading and drawing samples come on top.</p>"
        )
    else:
        parts.append(f"<p>{as_text(forecast.origin)}</p>")
    return f'<div class="forecast">{"".join(parts)}</div>'
