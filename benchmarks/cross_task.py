"""NoRA beside LoRA on three other kinds of task: classification, translation, tagging.

    python benchmarks/cross_task.py [--tasks NAME ...] [--data FOLDER] [--smoke] [--note TEXT]

* sequence_classification: all-MiniLM-L6-v2 learns to choose the answers of ARC-Easy;
* translation: a small T5, trained here from scratch to translate names from English into French, is
  adapted to Italian;
* token_classification: all-MiniLM-L6-v2 learns to tag countries, languages, currencies, scripts and
  places by name.

NoRA 64/8 and LoRA r 8 sit on the same attention projections, the classification heads are trained
with them. Each method gets the same learning rates, the same steps and the same batches; the rate
is chosen by the validation score with seed 0, and run with two more seeds. "before" is the base
model, with its untrained head where it has one; "head alone" trains that head on the frozen base.

Rows are saved to `benchmarks/results/cross_task.json` as they come, and a run that is started again
goes on after the last one. What is missing (packages of the extra "tasks", the data of ARC-Easy) is
said and left out.
"""

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import RESULTS, write_result
from _tasks import REASONING, Task, answer_selection, missing, tagging, translation
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

from nora_diffusion.adapter import NoraConfig, attention_projections
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
PRETRAINING_STEPS, PRETRAINING_RATE, ADAPTATION_STEPS = 6000, 2e-3, 300
CHECKPOINT_EVERY = 250
WORK = Path.home() / ".cache" / "nora-bench" / "cross_task"

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = ("sequence_classification", "translation", "token_classification")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--data", type=Path, default=REASONING, help="folder of the reasoning sets")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to another file")
    parser.add_argument("--note", default="", help="what a reader must know about the run")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # of a head that is new it would tell every time
    transformers.logging.disable_progress_bar()
    table = Table("cross_task_smoke" if args.smoke else "cross_task", args.note)
    for name in args.tasks:
        why = missing(name, args.data)
        if why is not None:
            print(f"{name}: left out, {why}", flush=True)
            continue
        task = build(name, args.data, args.smoke)
        table.about(name, task)
        methods = ("nora", "lora") + (("head alone",) if name != "translation" else ())
        run_task(name, task, methods, table)
    table.write()


def build(name: str, data: Path, smoke: bool) -> Task:
    if name == "sequence_classification":
        return answer_selection(data / "ARC-Easy", smoke)
    if name == "token_classification":
        return tagging(smoke)
    return translation("it", pretrained_translator(smoke), ADAPTATION_STEPS, smoke)


def pretrained_translator(smoke: bool) -> Path:
    """Folder of the T5 that translates into French; trained once, from its last checkpoint."""
    folder = WORK / ("translator-smoke" if smoke else "translator")
    if folder.is_dir():
        return folder
    task = translation("fr", None, PRETRAINING_STEPS, smoke)
    trained = Trained(task.base(), PRETRAINING_RATE)
    checkpoint = folder.with_suffix(".safetensors")
    if checkpoint.is_file():
        tensors, progress = load_state(checkpoint)
        trained.restore(tensors, progress["step"])
    trained.module.train()
    while trained.step < task.steps:
        trained.module(**task.batch(random.Random(trained.step))).loss.backward()
        trained.update(learning_rate_at(trained.step, task.steps, PRETRAINING_RATE))
        if trained.step % CHECKPOINT_EVERY == 0:
            save_state(checkpoint, trained.tensors(), {"step": trained.step})
            print(f"translator into French: step {trained.step} of {task.steps}", flush=True)
    model: Any = trained.use_average()
    print(f"translator into French: {evaluate(model, task, 'test')}", flush=True)
    temporary = folder.with_suffix(".tmp")
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


def run_task(name: str, task: Task, methods: tuple[str, ...], table: "Table") -> None:
    """The base, then every method at every rate, and the best rate of each with every seed."""
    run = partial(run_once, name, task, table)
    run("before", None, SEEDS[0])
    for method in methods:
        best = max((run(method, rate, SEEDS[0]) for rate in RATES), key=validation)
        for seed in SEEDS[1:]:
            run(method, best["learning_rate"], seed)


def run_once(
    name: str, task: Task, table: "Table", method: str, rate: float | None, seed: int
) -> Row:
    """One training run and its scores; a row that is there already is not made again."""
    key = {"task": name, "method": method, "learning_rate": rate, "seed": seed}
    row = table.find(key)
    if row is None:
        model = adapted(task, method, seed)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = 0.0 if rate is None else train(model, task, rate, seed)
        scores = {part: evaluate(model, task, part) for part in ("validation", "test")}
        row = {**key, "trained": trained, "cpu_seconds": round(seconds, 1), **scores}
        table.add(row)
    return row


def validation(row: Row) -> float:
    """The score that chooses: the first one of the task."""
    return next(iter(row["validation"].values()))


def adapted(task: Task, method: str, seed: int) -> nn.Module:
    """The base with what a method trains; everything else is frozen."""
    model = task.base()
    torch.manual_seed(seed)  # for LoRA's start
    if method == "nora":
        config = NoraConfig(target_modules="attention", task_type=task.kind, seed=seed)
        return get_peft_model(model, config)
    if method == "lora":
        names = list(attention_projections(model))
        config = LoraConfig(r=8, lora_alpha=8, target_modules=names, task_type=task.kind)
        return get_peft_model(model, config)
    model.requires_grad_(False)
    if method == "head alone":
        model.get_submodule("classifier").requires_grad_(True)
    return model


def train(model: nn.Module, task: Task, rate: float, seed: int) -> float:
    """Train in place; returns the CPU seconds it took, which other work on the machine leaves."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, task.steps // 10, task.steps)
    model.train()
    start = time.process_time()
    for _ in range(task.steps):
        model(**task.batch(rng)).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - start


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str) -> dict[str, float]:
    model.eval()
    return {name: round(value, 4) for name, value in task.score(model, split).items()}


class Table:
    """The rows of the result file."""

    def __init__(self, name: str, note: str):
        self.name, self.note = name, note
        path = RESULTS / f"{name}.json"
        there = json.loads(path.read_text())["results"] if path.is_file() else {}
        self.rows: list[Row] = there.get("rows", [])
        self.tasks: dict[str, Any] = there.get("tasks", {})

    def about(self, name: str, task: Task) -> None:
        """Keep what the task is."""
        self.tasks[name] = {"data": task.data, "steps": task.steps}

    def find(self, key: Row) -> Row | None:
        """Return the row with these values, if it is there."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        """Add a row, print it, and save all."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Save all rows and their summary."""
        settings = {"learning_rates": RATES, "seeds": SEEDS, "chosen_on": "validation, seed 0"}
        results = {
            **settings, "tasks": self.tasks, "summary": summarise(self.rows), "rows": self.rows,
        }  # fmt: skip
        write_result(self.name, results, self.note)


def summarise(rows: list[Row]) -> list[Row]:
    """Means over the seeds at the chosen rate, a line for each task and method."""
    lines: list[Row] = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        first = [row for row in own if row["seed"] == SEEDS[0]]
        best = max(first, key=validation)
        tested = [row for row in own if row["learning_rate"] == best["learning_rate"]]
        means = {
            score: round(statistics.mean(row["test"][score] for row in tested), 4)
            for score in best["test"]
        }
        lines.append(
            {
                "task": task, "method": method, "trained": best["trained"],
                "learning_rate": best["learning_rate"], "seeds": len(tested), **means,
            }
        )  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
