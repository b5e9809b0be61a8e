"""``nora bench``: what can be compared, how much of it, and where the numbers go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nora_diffusion.config import UserError

if TYPE_CHECKING:
    from nora_diffusion.bench.ruler import Ruler

Rows = list[dict[str, Any]]

STEPS, LONGER_STEPS, SAMPLING_STEPS = 100, 400, 15
RESULTS, TRIALS = Path("benchmarks/results"), "trials.jsonl"


def add_arguments(
    parser: argparse.ArgumentParser, count: Callable[[str], int], devices: Sequence[str]
) -> None:
    """What all comparisons take; nothing heavy is imported.

    Args:
        parser: of the command.
        count: reads a number of at least 1.
        devices: names of devices, as in ``model.device``.
    """
    parser.add_argument("what", choices=tuple(COMPARISONS), help="; ".join(_HELP))
    parser.add_argument(
        "--check", action="store_true", help="with report: change nothing, fail where they disagree"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a few methods")
    parser.add_argument(
        "--steps", type=count, help=f"of a training (default {STEPS}; of longer {LONGER_STEPS})"
    )
    parser.add_argument(
        "--device", choices=devices, default="auto", help="where to train and draw (default auto)"
    )
    parser.add_argument(
        "--workers", type=count, default=os.cpu_count() or 1, help="trainings side by side"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help=f"folder of the results and of {TRIALS}, every finished trial (default {RESULTS})",
    )


def run(args: argparse.Namespace) -> int:
    """Run or continue one comparison, or report.

    Raises:
        UserError: an option does not belong to what is asked for.
    """
    if args.check and args.what != "report":
        raise UserError(
            f"--check: belongs to nora bench report, not to {args.what}; leave it out to run "
            f"{args.what}, or run: nora bench report --check"
        )
    args.steps = args.steps or _usual_steps(args)
    return COMPARISONS[args.what](args)


def _usual_steps(args: argparse.Namespace) -> int:
    return LONGER_STEPS if args.what == "longer" else STEPS


def _report(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.report import check_report, write_report

    if not args.check:
        changed = write_report(Path.cwd())
        print("\n".join(map(str, changed)) or "all pages say what the results say")
        return 0
    found = check_report(Path.cwd())
    for part in found:
        print(f"{part}: does not say what benchmarks/results says; run: nora bench report")
    return 1 if found else 0


def _methods(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.study import Plan, run_study

    return _compare(args, run_study, Plan(args.steps))


def _ablation(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.study import Plan, run_ablation

    return _compare(args, run_ablation, Plan(args.steps))


def _longer(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.study import Plan, run_longer

    return _compare(args, run_longer, Plan(args.steps, seeds=(0,)))


def _others(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.study import OTHER_SUBJECTS, OTHERS_SEARCHED_ON, Plan, run_others

    plan = Plan(args.steps, searched_on=OTHERS_SEARCHED_ON, subjects=OTHER_SUBJECTS, seeds=(0,))
    return _compare(args, run_others, plan)


def _rates(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.rates import PAIRS, run_rates

    steps, pairs, name = args.steps, PAIRS, args.what
    if args.quick:
        few = replace(PAIRS[0], subjects=("cactus",), seeds=(0,))
        steps, pairs, name = 2, (few,), f"{args.what}-quick"
    run_rates(steps, _ledger(args), _saver(args, name), pairs)
    print(f"all numbers: {args.out / name}.json")
    return 0


def _ranks(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.ranks import SUBJECTS, run_ranks
    from nora_diffusion.bench.study import Plan

    return _compare(args, run_ranks, Plan(args.steps, subjects=SUBJECTS, seeds=(0,)))


def _multi(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.multi import METHOD, RATE, MultiPlan, run_multi

    plan = MultiPlan(2, seeds=(0,)) if args.quick else MultiPlan(args.steps)
    about = {"steps_a_subject": plan.steps, "method": METHOD.name, "rate": RATE}

    def run(ruler: Ruler, rows: Rows, save: Callable[[Rows], None]) -> None:
        run_multi(plan, ruler, ruler.work / "multi", rows, save)

    return _go_on(args, about, run)


def _prior(args: argparse.Namespace) -> int:
    from nora_diffusion.bench.prior import METHOD, RATE, PriorPlan, run_prior

    plan = PriorPlan(2, subjects=("cactus",)) if args.quick else PriorPlan(args.steps)
    about = {"steps": plan.steps, "method": METHOD.name, "rate": RATE}
    return _go_on(args, about, partial(run_prior, plan))


def _go_on(
    args: argparse.Namespace,
    about: dict[str, Any],
    run: Callable[[Ruler, Rows, Callable[[Rows], None]], object],
) -> int:
    """A comparison in one process, whose rows so far are in its results."""
    import json

    from nora_diffusion.bench.ruler import Ruler

    ledger, name = _ledger(args), f"{args.what}-quick" if args.quick else args.what
    path, save = args.out / f"{name}.json", _saver(args, name)
    about = {**ledger.about, **about}
    there = json.loads(path.read_bytes())["results"] if path.is_file() else {}
    rows = there["rows"] if there.get("about") == about else []
    ruler = Ruler(ledger.work, ledger.sampling_steps, ledger.device)
    run(ruler, rows, lambda found: save({"about": about, "rows": found}))
    print(f"all numbers: {path}")
    return 0


def _compare(args: argparse.Namespace, run: Callable[..., dict[str, Any]], plan: Any) -> int:
    from nora_diffusion.bench.plots import PLOTS

    name = args.what
    if args.quick:
        plan, name = _quick(plan), f"{name}-quick"
    results = run(plan, _ledger(args), _saver(args, name))
    if results["summary"]:
        print(_table(results["summary"]))
    key, draw = PLOTS[args.what]
    print(f"plot: {draw(results[key], args.out / f'{name}.png')}")
    print(f"all numbers: {args.out / name}.json")
    return 0


def _quick(plan: Any) -> Any:
    """Every stage, on one subject, two steps a training, two rates a method."""
    from nora_diffusion.bench.methods import PAPER, lora, nora

    few = (lora("LoRA r 1", 1), lora("LoRA r 16", 16))
    return replace(
        plan, steps=2, searched_on=("cactus",), variants_on=("cactus",), subjects=("cactus",),
        seeds=(0,), baselines=few, variants=(nora(), PAPER), finalists=1, rates=(1, 2),
    )  # fmt: skip


def _ledger(args: argparse.Namespace) -> Any:
    from nora_diffusion.bench.ledger import Ledger
    from nora_diffusion.bench.ruler import BASE_HASH
    from nora_diffusion.evaluation.image_features import NAME
    from nora_diffusion.families.base import resolve_device
    from nora_diffusion.mini.__main__ import PRESETS, default_work_folder

    sampling_steps = 2 if args.quick else SAMPLING_STEPS
    about = {
        "base": f"mini {BASE_HASH}",
        "backend": NAME,
        "text_backend": "mini-CLIP score",
        "pictures_a_run": 25,
        "sampling_steps": sampling_steps,
        "targets": "attention and feed-forward of the UNet, attention of the text encoder",
    }
    work = default_work_folder() / PRESETS["cpu"].name
    device = resolve_device(args.device)
    return Ledger(args.out / TRIALS, work, about, sampling_steps, args.workers, device)


def _saver(args: argparse.Namespace, name: str) -> Callable[[dict[str, Any]], None]:
    from nora_diffusion.bench.record import write_record

    command = f"nora bench {args.what}" + (" --quick" if args.quick else "")
    if args.steps != _usual_steps(args):
        command += f" --steps {args.steps}"

    def save(results: dict[str, Any]) -> None:
        write_record(args.out / f"{name}.json", command, results)

    return save


def _table(summary: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'method':36} {'trained':>9} {'file':>9} {'rate':>7} {'gap':>6} {'text':>6} {'bg':>6}"
    ]
    for row in summary:
        lines.append(
            f"{row['method']:36} {row['trained_parameters'] or 0:9,} {row['file_bytes'] or 0:9,} "
            f"{row['learning_rate']:7g} {row.get('gap_closed', 0):6.1%} "
            f"{row.get('text_adapted', 0):6.3f} {row.get('background_adapted', 0):6.1%}"
        )
    return "\n".join(lines)


COMPARISONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "methods": _methods,
    "ablation": _ablation,
    "longer": _longer,
    "others": _others,
    "rates": _rates,
    "ranks": _ranks,
    "multi": _multi,
    "prior": _prior,
    "report": _report,
}
_HELP = (
    "methods: NoRA's variants and PEFT's methods on eight subjects of mini",
    "ablation: which part of NoRA does what",
    "longer: NoRA and LoRA in trainings of more steps",
    "others: NoRA and LoRA on twelve other subjects",
    "rates: what other learning rates would have changed",
    "ranks: outer and inner rank",
    "multi: several subjects in one NoRA, in one each, and blended",
    "prior: what keeping the class costs a subject, and what it saves",
    "report: write the recorded numbers into README and docs of this checkout",
)
