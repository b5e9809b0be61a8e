"""LoRA, LoRA-XS form and NoRA on a language model: ARC-E, ARC-C, OBQA and BoolQ, three seeds.

    python benchmarks/language.py [--full] [--answers text] [--dtype bf16] [--workers 2]
                                  [--data DIR] [--work DIR]

Every method gets the same data, steps and number of learning rates. One seed and held-out training
questions choose the rate of each method, and which two of NoRA's bases are reported; the test
questions choose nothing. Data: LLM-Adapters' files in ../shared/data/reasoning.

With `--answers number` a question lists its options and the answer is "answer2", as LLM-Adapters
has it; with `--answers text` it does not, and the answer is the option itself, which small models
that cannot tell numbered options apart are able to choose by likelihood.

`--full` is for a GPU: all lengths, up to 1,000 questions a set; some fifteen minutes of an H200 for
six workers beside other work, who need up to 16 GB each. Without it the sizes are those of `SMALL`;
a CPU that multiplies bf16 in hardware (AMX) is quicker with `--dtype bf16`.
Finished rows are kept in the work folder; the same command goes on from there, and Ctrl-C lets
those in progress finish. Every row is measured in a process of its own, so that none inherits
memory or a generator's state; with two workers, on half of the cores.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, bytes_saved, write_result
from _language_questions import SETS, Size, read_questions
from _language_scores import accuracies, summarise
from accelerate.utils import send_to_device
from peft import LoraConfig, PsoftConfig
from transformers import TrainerCallback

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.bench.parallel import side_by_side
from nora_diffusion.data.packing import Collator
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.multiple_choice import evaluate
from nora_diffusion.families.base import resolve_device
from nora_diffusion.language_config import Train
from nora_diffusion.language_model import load_model, load_tokenizer, takes_logits_to_keep
from nora_diffusion.train.language import add_adapter, fit, training_arguments
from nora_diffusion.train.trainer import make_trainer

DATA = ROOT.parent / "shared" / "data" / "reasoning"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's
RATES = {
    "lora": (5e-4, 2e-3, 8e-3),
    # Its core starts at 0 beside an orthonormal one, and so moves W less at the same rate.
    "nora": (2e-3, 8e-3, 3e-2),
}
SEEDS = (0, 1, 2)
LEAST_PROBABILITY = 1e-30
BASES = ("weight", "weight_minor", "activation", "gradient", "random")
FIXED = ("lora_r8", "lora_r32", "lora_xs_r32")
NO_SYSTEM_TURN = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PAPER = {
    "points_over_lora": 2.2,
    "training_time_percent": -22.5,
    "memory_percent": -20.7,
    "parameters": "4 %, whose wording does not say whether of LoRA's or fewer",
}


SMALL = Size(96, 80, 8, 1000, 40, 400, 8, False)
FULL = Size(512, 120, 32, 10_000, 100, 1000, 16, True)


def methods() -> dict[str, Any]:
    """The PEFT configuration of each method, made anew for each run."""
    found: dict[str, Any] = {
        "lora_r8": LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)),
        "lora_r32": LoraConfig(r=32, lora_alpha=64, target_modules=list(TARGETS)),
        # A trained 32 x 32 core between frozen singular directions: NoRA 64/8's 1,024 numbers.
        "lora_xs_r32": PsoftConfig(
            r=32, psoft_alpha=32, target_modules=list(TARGETS), psoft_orth=False,
            psoft_mag_a=False, psoft_mag_b=False,
        ),
    }  # fmt: skip
    for basis in BASES:
        found[f"nora_64_8_{basis}"] = NoraConfig(
            r=64, inner_r=8, basis=basis, init="gradient", target_modules=list(TARGETS)
        )
    return found


def rates(method: str) -> tuple[float, ...]:
    """The learning rates a method is given, as many for each."""
    return RATES["nora" if method.startswith("nora") else "lora"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="larger sizes, for a GPU")
    parser.add_argument("--answers", choices=("number", "text"), default="number")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four sets")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/nora-bench/language")
    parser.add_argument("--workers", type=int, default=1, help="rows measured side by side")
    parser.add_argument("--smoke", action="store_true", help="two steps and two questions a set")
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"skipped: {args.data} is not there (LLM-Adapters' ARC, OBQA and BoolQ files)")
        return
    size = FULL if args.full else SMALL
    if args.smoke:
        size = Size(80, 2, 2, 20, 2, 2, 1, False)
    benchmark = Benchmark(
        args.base, args.device, size, args.data, args.work, args.workers, args.smoke,
        args.answers == "text", args.dtype,
    )  # fmt: skip
    try:
        benchmark.run()
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the rows in {benchmark.rows}")


@dataclass(frozen=True)
class Task:
    """What a row is of: a method with a rate and seed, or the base."""

    method: str = "base"
    rate: float | None = None
    seed: int | None = None
    test: bool = False

    def file(self, folder: Path) -> Path:
        """Where its row is kept."""
        kind = "test" if self.test else "search"
        return folder / f"{self.method}-{self.rate}-{self.seed}-{kind}.json"


@dataclass(frozen=True)
class Benchmark:
    """One base, one size: which rows there are, and what they say together."""

    base: str
    device: str
    size: Size
    data: Path
    work: Path
    workers: int
    smoke: bool
    text: bool = False  # whether answers are the options themselves
    dtype: str = "auto"  # of the base's weights

    @property
    def rows(self) -> Path:
        """Where finished rows are kept: a folder for each base, size, data, device and methods."""
        settings = [
            self.base, asdict(self.size), str(self.data.resolve()),
            resolve_device(self.device).type, TARGETS, RATES,
            {name: config.to_dict() for name, config in methods().items()},
        ]  # fmt: skip
        settings += ["text"] if self.text else []
        settings += [] if self.dtype == "auto" else [self.dtype]
        key = hashlib.sha256(json.dumps(settings, default=sorted, sort_keys=True).encode())
        return self.work / f"{Path(self.base).name}-{key.hexdigest()[:12]}"

    def run(self) -> None:
        """Base, search, then the chosen methods with the other seeds."""
        of_bases = {basis: f"nora_64_8_{basis}" for basis in BASES}
        middle = [Task(name, middle_of(rates(name)), 0) for name in of_bases.values()]
        base, *found = self.measured([Task(test=True), *middle])
        first = dict(zip(of_bases, found, strict=True))
        best = sorted(BASES, key=lambda basis: first[basis]["validation"], reverse=True)[:2]
        chosen = (*FIXED, *(of_bases[basis] for basis in best))
        self.measured([Task(method, rate, 0) for method in chosen for rate in rates(method)])
        searched = {method: self._search(method) for method in chosen}
        self._write(base, first, searched, {})
        finals: dict[str, list[dict[str, Any]]] = {method: [] for method in chosen}
        tasks = [
            Task(method, searched[method]["learning_rate"], seed, test=True)
            for seed in SEEDS
            for method in chosen
        ]
        for row in self.measured(tasks):
            finals[row["method"]].append(row)
        self._write(base, first, searched, finals)
        print(json.dumps(summarise(base, finals), indent=2))

    def _search(self, method: str) -> dict[str, Any]:
        """Scores of a method's rates, which have been measured."""
        tried = self.measured([Task(method, rate, 0) for rate in rates(method)])
        best = max(tried, key=lambda row: row["validation"])
        return {
            "validation": {f"{row['learning_rate']:g}": row["validation"] for row in tried},
            "learning_rate": best["learning_rate"],
            "trained_parameters": best["trained_parameters"],
        }

    def measured(self, tasks: list[Task]) -> list[dict[str, Any]]:
        """The rows of these trainings, from the work folder where they are there."""
        self.rows.mkdir(parents=True, exist_ok=True)
        left = [task for task in tasks if not task.file(self.rows).is_file()]
        if left:
            self.measure(left)
        return [json.loads(task.file(self.rows).read_bytes()) for task in tasks]

    def measure(self, tasks: list[Task]) -> None:
        """Each in a fresh process; every row is stored as it comes."""
        workers = min(self.workers, len(tasks))
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1,
            initializer=share_cores, initargs=(workers,),
        )  # fmt: skip
        with pool:
            side_by_side(pool, workers, partial(measure_row, self), tasks, self.store)

    def store(self, task: Task, row: dict[str, Any]) -> None:
        """Keep a finished row."""
        write_atomically(task.file(self.rows), json.dumps(row).encode())
        told = {k: v for k, v in row.items() if k != "sets"}
        print(json.dumps(told | accuracies(row)), flush=True)

    def _write(
        self,
        base: dict[str, Any],
        first: dict[str, Any],
        searched: dict[str, Any],
        finals: dict[str, list[dict[str, Any]]],
    ) -> None:
        if self.smoke:
            return
        rows = [{**row, "sets": accuracies(row)} for found in finals.values() for row in found]
        write_result(
            "language-text" if self.text else "language",
            {
                "base": self.base,
                "answers": "text" if self.text else "number",
                "size": asdict(self.size),
                "dtype": self.dtype,
                "workers": self.workers,
                "targets": TARGETS,
                "rates": RATES,
                "tries_a_method": {m: len(s["validation"]) for m, s in searched.items()},
                "init_of_nora": "gradient",
                "criterion": "mean log-probability of the right option, validation questions",
                "choice_of_bases": {b: row["validation"] for b, row in first.items()},
                "search": searched,
                "base_scores": accuracies(base),
                "base_validation": base["validation"],
                "summary": summarise(base, finals) if all(finals.values()) and finals else {},
                "paper_against_lora_on_llama_3_8b": PAPER,
                "rows": rows,
            },
            note=(
                "See size for what was trained on and asked. step_s is the median of one step, "
                "forward, backward and update; without a GPU in CPU seconds. On a GPU that several "
                "workers share they slow one another: see language_cost.json for undisturbed times."
            ),
        )


def share_cores(workers: int) -> None:
    """In a worker: its part of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def measure_row(benchmark: Benchmark, task: Task) -> dict[str, Any]:
    """A row, measured: one training and its scores."""
    return Bench(benchmark).row(task)


def middle_of(values: tuple[float, ...]) -> float:
    return values[len(values) // 2]


class Bench:
    """The base with its data; a row starts from frozen weights that nothing has touched."""

    def __init__(self, benchmark: Benchmark):
        self.size, self.text = benchmark.size, benchmark.text
        self.device = resolve_device(benchmark.device)
        self.tokenizer = load_tokenizer(benchmark.base)
        if not self.size.system_turn:
            self.tokenizer.chat_template = NO_SYSTEM_TURN
        self.train, self.validation, self.test = read_questions(
            benchmark.data, benchmark.rows, self.tokenizer, self.size, self.text
        )
        self.base = load_model(benchmark.base, benchmark.dtype, self.device)
        self.collator = Collator(
            self.tokenizer.pad_token_id, logits_to_keep=takes_logits_to_keep(self.base)
        )

    def row(self, task: Task) -> dict[str, Any]:
        """Train where there is something to train, and answer the questions."""
        row: dict[str, Any] = {
            "method": task.method, "learning_rate": task.rate, "seed": task.seed,
        }  # fmt: skip
        model = self.base
        if task.rate is not None and task.seed is not None:
            model, measured = self._train(task.method, task.rate, task.seed)
            row |= measured
        if not task.test or task.seed in (0, None):
            scores = [self._evaluate(model, file, 1) for file in self.validation]
            values = [p for one in scores for p in one.probability]
            # A training that diverged finds nothing likely.
            sure = np.clip(np.nan_to_num(values, nan=0.0), LEAST_PROBABILITY, None)
            row["validation"] = float(np.mean(np.log(sure)))
        if task.test:
            row["sets"] = {
                name: asdict(self._evaluate(model, file, 40 if self.text else 12))
                for name, file in zip(SETS, self.test, strict=True)
            }
        return row

    def _evaluate(self, model: Any, file: Path, max_new_tokens: int) -> Any:
        return evaluate(
            model, self.tokenizer, file, max_new_tokens=max_new_tokens, cache=False,
            batch_size=64 if self.device.type == "cpu" else 256, progress=lambda done, total: None,
        )  # fmt: skip

    def _train(self, method: str, rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
        size = self.size
        cfg = Train(
            steps=size.steps, batch_size=size.batch_size, learning_rate=rate, seed=seed,
            lr_warmup_steps=max(1, size.steps // 10), lr_schedule="linear",
        )  # fmt: skip
        config = methods()[method]
        if isinstance(config, NoraConfig):
            config.seed = seed
        model = add_adapter(self.base, config, seed=seed)
        fit(model, config, self.train, self.collator, cfg, size.fit_batches)
        batch = send_to_device(self.collator(self.train[:4]), self.device)
        saved = bytes_saved(model, lambda: model(**batch))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = Clock(self.device.type == "cuda")
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(cfg, Path(folder), self.device)
            arguments.save_strategy = "no"
            trainer = make_trainer(model, self.train, self.collator, arguments, [clock])
            trainer.train()
            file_bytes = self._saved_bytes(model, config, Path(folder))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        measured = {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "file_bytes": file_bytes,
            "step_s": round(statistics.median(clock.seconds), 3),
            "activation_bytes_of_4_examples": saved,
            "first_losses": losses[:5],
            "last_losses": losses[-5:],
        }
        if self.device.type == "cuda":
            measured["peak_bytes"] = torch.cuda.max_memory_allocated()
        return model, measured

    def _saved_bytes(self, model: Any, config: Any, folder: Path) -> int:
        if isinstance(config, NoraConfig):
            return save_adapter(model, folder / "adapter.safetensors").stat().st_size
        model.save_pretrained(str(folder / "peft"), save_embedding_layers=False)
        return (folder / "peft" / "adapter_model.safetensors").stat().st_size


class Clock(TrainerCallback):
    """Seconds of each step; without a GPU those of this process, as others use the cores too."""

    def __init__(self, on_gpu: bool) -> None:
        self.now = time.perf_counter if on_gpu else time.process_time
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the watch."""
        self._start = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the watch."""
        self.seconds.append(self.now() - self._start)


if __name__ == "__main__":
    sys.exit(main())
