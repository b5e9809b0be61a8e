"""``nora plan``: prints one plan, a table of several, or JSON."""

from __future__ import annotations

import argparse
import json

from nora_diffusion.planning import table
from nora_diffusion.planning.plan import Request, make_plan, measure_speed


def show(args: argparse.Namespace) -> int:
    """Plan what the command line asks for and print it; returns the exit code."""
    asked = Request(
        targets=args.targets,
        r=args.r,
        inner_r=args.inner_r,
        lora_r=args.lora_r,
        lora_xs_r=args.lora_xs_r,
        dtype=args.dtype,
        batch=args.batch,
        tokens=args.tokens,
        resolution_px=args.resolution,
    )
    if args.json:
        plans = [make_plan(model, asked) for model in args.models]
        print(json.dumps([table.as_json(plan, measure_speed(plan)) for plan in plans], indent=2))
    elif len(args.models) == 1:
        plan = make_plan(args.models[0], asked)
        print("\n".join(table.lines(plan, measure_speed(plan))))
    else:
        print("\n".join(table.head()))
        for model in args.models:
            print(table.row(make_plan(model, asked)), flush=True)
    return 0
