"""``nora bench rates``: mini's NoRA beside LoRA on all subjects, and at other searches' rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nora_diffusion.bench.bootstrap import paired_interval
from nora_diffusion.bench.ledger import Ledger, Row
from nora_diffusion.bench.methods import (
    FEED_FORWARD,
    LORA_FEED_FORWARD,
    SPLIT,
    TWO_RATES,
    WIDER,
    Method,
    lora,
)
from nora_diffusion.bench.study import OTHER_SUBJECTS, Plan
from nora_diffusion.bench.summary import mean_row, score
from nora_diffusion.bench.trial import Trial
from nora_diffusion.mini.subjects import SUBJECTS


@dataclass(frozen=True)
class Pair:
    """A method at a rate beside another, on the same subjects and seeds."""

    method: Method
    rate: float
    other: Method
    other_rate: float
    subjects: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)

    def trials(self, steps: int) -> tuple[list[Trial], list[Trial]]:
        """Those of the method, and those of the other."""
        sides = ((self.method, self.rate), (self.other, self.other_rate))
        one, other = (
            [Trial(method, s, rate, seed, steps) for seed in self.seeds for s in self.subjects]
            for method, rate in sides
        )
        return one, other


_R1, _R2, _R16 = (lora(f"LoRA r {r}", r) for r in (1, 2, 16))
_SEEDS = Plan(steps=1).seeds
_ALL = (*SUBJECTS, *OTHER_SUBJECTS)
PAIRS = (
    Pair(FEED_FORWARD, 2e-2, _R1, 6e-3, SUBJECTS, _SEEDS),
    *(
        Pair(FEED_FORWARD, 2e-2, other, rate, _ALL)
        for other, rate in (
            (_R1, 6e-3),
            (_R2, 6e-3),
            (LORA_FEED_FORWARD[0], 6e-3),
            (_R16, 2e-3),
            (WIDER, 2e-2),
        )
    ),
    *(
        Pair(FEED_FORWARD, 2e-2, other, rate, OTHER_SUBJECTS, _SEEDS)
        for other, rate in ((_R1, 6e-3), (_R16, 2e-3))
    ),
    Pair(WIDER, 2e-2, _R1, 6e-3, SUBJECTS, _SEEDS),
    Pair(_R1, 6e-3, _R1, 2e-2, SUBJECTS, _SEEDS),
    *(
        Pair(WIDER, 2e-2, other, rate, _ALL)
        for other, rate in ((_R1, 6e-3), (_R2, 6e-3), (_R16, 2e-3))
    ),
    Pair(WIDER, 2e-2, _R1, 2e-2, OTHER_SUBJECTS),
    Pair(WIDER, 1e-2, WIDER, 2e-2, OTHER_SUBJECTS),
    Pair(TWO_RATES, 2e-2, SPLIT, 1.2e-2, SUBJECTS, _SEEDS),
)


def run_rates(
    steps: int, ledger: Ledger, save: Callable[[Row], None], pairs: Sequence[Pair] = PAIRS
) -> Row:
    """Run or continue the pairs.

    Args:
        steps: of a training.
        ledger: finished trials.
        save: called with the results at the end.
        pairs: what is compared.

    Returns:
        ``pairs``: for each its means on either side, and the difference with its interval.
    """
    ledger.run([trial for pair in pairs for side in pair.trials(steps) for trial in side])
    results = {
        "about": ledger.about,
        "steps": steps,
        "pairs": [_compared(pair, steps, ledger) for pair in pairs],
    }
    save(results)
    return results


def _compared(pair: Pair, steps: int, ledger: Ledger) -> Row:
    found = [[ledger.row(trial) for trial in side] for side in pair.trials(steps)]
    one, other = ([{**row, "score": score(row)} for row in side] for side in found)
    return {
        "subjects": len(pair.subjects),
        "method": pair.method.name,
        "other": pair.other.name,
        **{
            side: {"learning_rate": rate, **mean_row(rows)}
            for side, rate, rows in (("one", pair.rate, one), ("beside", pair.other_rate, other))
        },
        "difference": {key: paired_interval(one, other, key) for key in ("score", "text_adapted")},
    }
