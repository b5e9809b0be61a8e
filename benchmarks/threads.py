"""What waiting threads cost a training on a CPU, alone and beside other busy programs.

    python benchmarks/threads.py [--rounds N]

Trains mini by `nora-dreambooth` with a thread for each core: with libgomp's own 300,000 looks at a
barrier before a thread that waits gives its core away, with the number that the commands set, and
with none; on a machine that is otherwise free, then beside one busy program, then beside one for
each core. Needs a machine with nothing else to do, and libgomp (torch on Linux).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, write_result

from nora_diffusion.cores import SPINS

STEPS = {True: 4, False: 40}  # beside busy programs a step may take a quarter of a minute
LEFT_OUT = 2  # steps in which the process is still warming up
LIBRARY = "300000"
COMMAND = "from nora_diffusion.cli import main_dreambooth; raise SystemExit(main_dreambooth())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cores = os.cpu_count() or 1
    found = []
    for busy in dict.fromkeys((0, 1, cores)):
        others = [multiprocessing.Process(target=turn, daemon=True) for _ in range(busy)]
        for other in others:
            other.start()
        times: dict[str, list[float]] = {LIBRARY: [], SPINS: [], "0": []}
        for _ in range(rounds):
            for spins, own in times.items():
                own.append(step_seconds(spins, STEPS[busy > 0]))
        for other in others:
            other.terminate()
        medians = {spins: round(statistics.median(own), 4) for spins, own in times.items()}
        found.append({"busy_programs": busy, "step_s": medians})
        print(json.dumps(found[-1]), flush=True)
    write_result("threads", {"base": "mini", "cores": cores, "spins": SPINS, "rows": found})


def turn() -> None:
    """A program that wants a core all the time."""
    while True:
        pass


def step_seconds(spins: str, steps: int) -> float:
    """Seconds of a step by the clock, without the first ones."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment["GOMP_SPINCOUNT"] = spins
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable, "-c", COMMAND, "mini",
                "--data.subject", str(ROOT / "sample_data/subject"),
                "--data.class_name", "flower", "--train.steps", str(LEFT_OUT + steps),
                "--train.log_every", str(LEFT_OUT), "--sample.n", "1", "--sample.steps", "1",
                "--output.dir", folder,
            ],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        lines = (Path(folder) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    at = {e["step"]: e["time"] for e in map(json.loads, lines) if e["event"] == "step"}
    return (at[LEFT_OUT + steps] - at[LEFT_OUT]) / steps


if __name__ == "__main__":
    main()
