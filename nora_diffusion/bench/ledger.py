"""Finished trials, kept in one file: no command repeats what another has measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nora_diffusion.bench.parallel import side_by_side
from nora_diffusion.bench.trial import Trial, run_trial

Row = dict[str, Any]


class Ledger:
    """Rows of trials on one base, by one protocol.

    Args:
        file: all rows, one a line as JSON, those of other protocols among them; made if missing.
        work: work folder of mini's recipe.
        about: base and protocol; rows of another are not taken.
        sampling_steps: denoising steps of every picture.
        workers: processes that train side by side, one thread each.
        device: where they train and draw.
    """

    def __init__(
        self,
        file: Path,
        work: Path,
        about: Row,
        sampling_steps: int,
        workers: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.file, self.work, self.about = file, work, about
        self.sampling_steps, self.workers = sampling_steps, workers
        self.device = torch.device(device)
        self._rows: dict[str, Row] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if row.pop("about") == about:
                self._rows[_name(row)] = row

    def find(self, trial: Trial) -> Row | None:
        """The row of a trial; None where there is none."""
        return self._rows.get(_name(trial.key))

    def run(self, trials: Sequence[Trial], on_row: Callable[[], None] = lambda: None) -> list[Row]:
        """Rows of all the trials, in their order; ``on_row`` is called after each new one."""
        # By name: what is asked for twice is measured once.
        left = [*{_name(t.key): t for t in trials if self.find(t) is None}.values()]
        if left:
            self._measure(left, on_row)
        return [self.row(trial) for trial in trials]

    def row(self, trial: Trial) -> Row:
        """The row of a finished trial."""
        row = self.find(trial)
        if row is None:
            raise KeyError(f"not measured: {trial.key}")
        return row

    def step_cpu_s(self, methods: Sequence[str], steps: int) -> dict[str, float]:
        """CPU seconds a step of trainings of ``steps``: each method's mean on one kind of CPU.

        A longer training spreads what it does once over more steps: another study's do not count.

        It is the one on which most of the methods were timed, of several the last; what was not
        timed there is left out.
        """
        times: dict[str | None, dict[str, list[float]]] = {}
        for row in self._rows.values():
            if "step_cpu_s" in row and row["method"] in methods and row["steps"] == steps:
                # Put last anew: of equals the latest counts. The first trials name no processor.
                own = times.pop(row.get("processor"), {})
                times[row.get("processor")] = own
                own.setdefault(row["method"], []).append(row["step_cpu_s"])
        best = max(reversed(times.values()), key=len, default={})
        return {method: round(statistics.mean(found), 4) for method, found in best.items()}

    def _measure(self, trials: Sequence[Trial], on_row: Callable[[], None]) -> None:
        # Fresh processes: torch takes its number of threads from the environment at the start.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, len(trials))
        pool = ProcessPoolExecutor(
            workers,
            context,
            initializer=_start_worker,
            initargs=(self.work, self.sampling_steps, self.device),
        )
        with pool, tqdm(total=len(trials), unit="trial") as bar:

            def finished(trial: Trial, row: Row) -> None:
                self._write(trial, row)
                bar.update()
                on_row()

            side_by_side(pool, workers, _work, trials, finished)

    def _write(self, trial: Trial, row: Row) -> None:
        self._rows[_name(trial.key)] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**row, "about": self.about}).encode() + b"\n"
        with open(self.file, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, of a run that was killed
                    line = b"\n" + line
            file.write(line)  # one write: lines do not mix


def _name(row: Row) -> str:
    return json.dumps([row[key] for key in ("method", "subject", "learning_rate", "seed", "steps")])


_ruler: Any = None


def _start_worker(work: Path, sampling_steps: int, device: torch.device) -> None:
    from nora_diffusion.bench.ruler import Ruler

    global _ruler
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the protocol says
    _ruler = Ruler(work, sampling_steps, device)


def _work(trial: Trial) -> Row:
    return run_trial(trial, _ruler)
