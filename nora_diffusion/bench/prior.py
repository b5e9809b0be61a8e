"""``nora bench prior``: what keeping the class by the base's own predictions costs and saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nora_diffusion.bench.methods import SPLIT
from nora_diffusion.bench.ruler import PHOTO_PX, Ruler
from nora_diffusion.bench.trial import Trial, open_session, trial_config
from nora_diffusion.mini.subjects import SUBJECTS, subject_views
from nora_diffusion.train.dreambooth import train

PRIORS = ("none", "base_prediction")
METHOD, RATE = SPLIT, 2e-2

Row = dict[str, Any]


@dataclass(frozen=True)
class PriorPlan:
    """How much is run.

    Attributes:
        steps: of a training.
        subjects: that are learnt.
        seeds: of trainings and pictures.
    """

    steps: int
    subjects: tuple[str, ...] = SUBJECTS
    seeds: tuple[int, ...] = (0,)


def run_prior(
    plan: PriorPlan, ruler: Ruler, rows: list[Row], save: Callable[[list[Row]], None]
) -> list[Row]:
    """Learn every subject without and with the prior, as far as it has not been.

    Args:
        plan: how much.
        ruler: what measures, the class without the trigger word too.
        rows: those of an earlier call; added to.
        save: called with all rows after every new one.
    """
    done = {(row["prior"], row["subject"], row["seed"]) for row in rows}
    for seed in plan.seeds:
        for subject in plan.subjects:
            for prior in PRIORS:
                if (prior, subject, seed) in done:
                    continue
                method = replace(METHOD, nora=METHOD.nora | {"train.prior": prior})
                found = _measured(Trial(method, subject, RATE, seed, plan.steps), ruler)
                rows.append({"prior": prior, "subject": subject, "seed": seed, **found})
                save(rows)
    return rows


def _measured(trial: Trial, ruler: Ruler) -> Row:
    views = subject_views(trial.subject, ruler.work, PHOTO_PX)
    with tempfile.TemporaryDirectory() as folder:
        cfg = trial_config(trial, views, Path(folder))
        session = open_session(cfg, trial.method, Path(folder), ruler.device)
        train(session)
    for model in session.models.values():
        model.eval()
    drawn = ruler.draw(session.family, views, trial.seed)
    return {k: round(v, 5) for k, v in ruler.score(drawn, views, trial.seed).items()}
