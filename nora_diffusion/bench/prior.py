"""``nora bench prior``: what keeping the class by the base's own predictions costs and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nora_diffusion.bench.methods import SPLIT
from nora_diffusion.bench.ruler import Ruler
from nora_diffusion.bench.trial import Trial, run_trial
from nora_diffusion.mini.subjects import SUBJECTS

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
                trial = Trial(method, subject, RATE, seed, plan.steps)
                rows.append({"prior": prior, **run_trial(trial, ruler, drift=True)})
                save(rows)
    return rows
