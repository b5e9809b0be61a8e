"""``nora bench methods``: every method with its own learning rate, on held-out subjects of mini.

1. *search*: every method at each of its rates, as many for all, on subjects that are not measured
   later; the best mean score is the method's rate.
2. *variants*: bases, starts and timestep laws of NoRA on two subjects; the best four go on.
3. *final*: these, NoRA as in the paper and with the fitted start on the paper's basis, and all
   baselines on eight subjects with three seeds.

The score that chooses is the share of the gap to the subject that is closed, times the share of the
backgrounds named in the prompts that is kept: a copy of the photos wins nothing. The two subjects
of the variants are among the eight: the best of many variants may owe them some luck.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nora_diffusion.bench.ledger import Ledger, Row
from nora_diffusion.bench.methods import (
    BASELINES,
    FEED_FORWARD,
    FITTED,
    LORA_FEED_FORWARD,
    PAPER,
    SPLIT,
    TWO_RATES,
    VARIANTS,
    WIDER,
    WIDEST,
    Method,
    lora,
    nora,
)
from nora_diffusion.bench.summary import mean_row, score, sizes, summarise
from nora_diffusion.bench.trial import Trial
from nora_diffusion.mini.subjects import SUBJECTS

SEARCHED_ON = ("rooster", "cactus")
FINALISTS = 4
ABLATION = (
    lora("outer trained, no inner (PiSSA r 32)", 32, init_lora_weights="pissa"),
    nora(basis="random"),
    PAPER,
    nora(),
    FITTED,
    SPLIT,
    TWO_RATES,
    WIDER,
    FEED_FORWARD,
    lora("LoRA r 16", 16),
)
OTHERS = (
    SPLIT,
    WIDER,
    WIDEST,
    FEED_FORWARD,
    nora(basis="gradient", init="gradient", text_basis="random"),
    *(lora(f"LoRA r {r}", r) for r in (1, 2, 16)),
    *LORA_FEED_FORWARD,
)
OTHER_SUBJECTS = (
    "leopard",
    "black bird",
    "blowfish",
    "dragon",
    "two-hump camel",
    "snail",
    "green apple",
    "cherry blossom",
    "house with garden",
    "basketball",
    "tropical drink",
    "circus tent",
)
"""Held-out emoji with an animation that are not among the eight, nor searched on."""

OTHERS_SEARCHED_ON = (
    *SEARCHED_ON,
    "parrot",
    "lady beetle",
    "mango",
    "fire engine",
    "teddy bear",
    "hiking boot",
)
"""More than ``SEARCHED_ON``, which alone gives LoRA r 1 a rate that suits few other subjects."""

LONGER = (
    TWO_RATES,
    SPLIT,
    FEED_FORWARD,
    *(lora(f"LoRA r {r}", r) for r in (1, 2, 16)),
)


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: of a training.
        searched_on: subjects the learning rates are chosen on.
        variants_on: subjects NoRA's variants are chosen on.
        subjects: of the final stage.
        seeds: of the final stage; the other stages take the first.
        baselines: methods beside NoRA.
        variants: of NoRA.
        finalists: variants that reach the final stage.
        rates: which of each method's learning rates are tried.
    """

    steps: int
    searched_on: tuple[str, ...] = SEARCHED_ON
    variants_on: tuple[str, ...] = SUBJECTS[:2]
    subjects: tuple[str, ...] = SUBJECTS
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: tuple[Method, ...] = BASELINES
    variants: tuple[Method, ...] = VARIANTS
    finalists: int = FINALISTS
    rates: tuple[int, ...] = (0, 1, 2, 3)


def run_study(plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> Row:
    """Run or continue all stages.

    Args:
        plan: how much.
        ledger: finished trials.
        save: called with all results so far after every trial and at the end.

    Returns:
        The results, as saved.
    """
    study = Study(plan, ledger, save)
    study.search((PAPER, nora()))
    finalists = study.choose_variants()
    more = (FITTED, SPLIT, TWO_RATES, WIDER, WIDEST, FEED_FORWARD, *finalists)
    baselines = (*plan.baselines, *LORA_FEED_FORWARD)
    study.search((*more, *baselines))
    ours = {method.name: method for method in (PAPER, *more)}
    study.final((*baselines, *ours.values()))
    return study.results


def run_ablation(plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> Row:
    """The paper's ablation: which part of NoRA does what; arguments as of ``run_study``.

    The outer factors trained without an inner pair are PiSSA of NoRA's outer rank. Outer factors
    frozen without an inner pair are the base, whose numbers stand in every row.
    """
    return _compare(ABLATION, plan, ledger, save)


def run_longer(plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> Row:
    """What is shipped beside LoRA in trainings of more steps, each with a search of its own.

    Arguments as of ``run_study``.
    """
    return _compare(LONGER, plan, ledger, save)


def run_others(plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> Row:
    """What is shipped beside LoRA on subjects that did not decide what is shipped.

    Arguments as of ``run_study``.
    """
    return _compare(OTHERS, plan, ledger, save)


def _compare(
    methods: Sequence[Method], plan: Plan, ledger: Ledger, save: Callable[[Row], None]
) -> Row:
    study = Study(plan, ledger, save)
    study.search(methods)
    study.final(methods)
    return study.results


class Study:
    """The stages, and what they have found so far."""

    def __init__(self, plan: Plan, ledger: Ledger, save: Callable[[Row], None]) -> None:
        self.plan, self.ledger, self._save = plan, ledger, save
        self.rates: dict[str, float] = {}
        self.results: Row = {
            "about": ledger.about,
            "steps": plan.steps,
            "searched_on": plan.searched_on,
            "variants_on": plan.variants_on,
            "search": {},
            "variants": [],
            "rows": [],
            "summary": [],
        }

    def search(self, methods: Iterable[Method]) -> None:
        """Find each method's learning rate."""
        tried = [(method, [method.rates[i] for i in self.plan.rates]) for method in methods]
        trials = [
            Trial(method, subject, rate, self.plan.seeds[0], self.plan.steps)
            for method, rates in tried
            for rate in rates
            for subject in self.plan.searched_on
        ]
        self.ledger.run(trials)
        for method, rates in tried:
            rows = {
                rate: [
                    self.ledger.row(trial)
                    for trial in trials
                    if trial.method == method and trial.rate == rate
                ]
                for rate in rates
            }
            scores = {rate: statistics.mean(map(score, rows[rate])) for rate in rates}
            lost = {rate for rate in rates if any("diverged" in row for row in rows[rate])}
            best = max(rates, key=lambda rate: (rate not in lost, scores[rate]))
            self.rates[method.name] = best
            self.results["search"][method.name] = {
                "learning_rate": best,
                "tries": len(scores),
                "scores": {f"{rate:g}": round(value, 4) for rate, value in scores.items()},
                "at_the_edge": best in (rates[0], rates[-1]),
                "trained_parameters": sizes(rows[best])["trained_parameters"],
            }
        self._save(self.results)

    def choose_variants(self) -> list[Method]:
        """The best variants of NoRA, each at the rate that was found for its start.

        A start that is fitted to the gradient takes the rate of the seeded one, which it replaces.
        """
        of_plain = self.rates[nora().name]
        rates = {"sigma": self.rates[PAPER.name], "orthogonal": of_plain, "gradient": of_plain}
        trials = {
            method.name: [
                Trial(method, subject, rates[method.nora["adapter.init"]], seed, self.plan.steps)
                for subject in self.plan.variants_on
                for seed in self.plan.seeds[:1]
            ]
            for method in self.plan.variants
        }
        self.ledger.run([trial for of_method in trials.values() for trial in of_method])
        rows = {name: [self.ledger.row(t) for t in own] for name, own in trials.items()}
        scores = {name: statistics.mean(map(score, own)) for name, own in rows.items()}
        order = sorted(self.plan.variants, key=lambda method: -scores[method.name])
        self.results["variants"] = [
            {
                "method": method.name,
                **mean_row(rows[method.name]),
                **sizes(rows[method.name]),
                "score": scores[method.name],
            }
            for method in order
        ]
        self._save(self.results)
        return order[: self.plan.finalists]

    def final(self, methods: Sequence[Method]) -> None:
        """All subjects and seeds; what is saved on the way is as far as all methods have come."""
        trials = [
            Trial(method, subject, self.rates[method.name], seed, self.plan.steps)
            for seed in self.plan.seeds
            for subject in self.plan.subjects
            for method in methods
        ]

        def so_far() -> None:
            blocks = [trials[i : i + len(methods)] for i in range(0, len(trials), len(methods))]
            found = [[self.ledger.find(trial) for trial in block] for block in blocks]
            self.results["rows"] = [row for rows in found if all(rows) for row in rows if row]
            names = [method.name for method in methods]
            times = self.ledger.step_cpu_s(names, self.plan.steps)
            self.results["summary"] = [
                {**line, "step_cpu_s": times.get(line["method"])}
                for line in summarise(self.results["rows"], names)
            ]
            self._save(self.results)

        self.ledger.run(trials, so_far)
        so_far()
