"""One of the processes of ``test_distributed.py``: runs commands, one after another."""

import json
import os
import sys
from pathlib import Path

from nora_diffusion.cli import main_dreambooth
from tests.train.conftest import counted_calls

END = "== end of a command =="
"""Printed after the output of each."""


def main(jobs: Path) -> None:
    rank = int(os.environ["RANK"])
    for job in json.loads(jobs.read_text()):
        with counted_calls() as calls:
            for of_rank, call, number in job["signals"]:
                if of_rank == rank:
                    calls.at[call] = lambda _, number=number: os.kill(os.getpid(), number)
            try:
                code = main_dreambooth(job["argv"])
            except SystemExit as stop:
                code = stop.code
        with open(f"{jobs}.{rank}", "a") as file:
            file.write(json.dumps([code, calls.count]) + "\n")
        print(END, flush=True)
        print(END, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
