"""Peak memory and step time of each family at its real shapes, beside LoRA and no adapter at all.

    python benchmarks/families.py [--cases sd15-512 flux-512 ...] [--rounds 5] [--note TEXT]

Random weights in the shapes of the shipped model configs, bf16 (Flux: nf4), the attention
projections adapted, encoded inputs of the lengths that a run has. Every case runs NoRA (r 64, inner
8, in float32 as in training), PEFT's LoRA (r 16, in the base's dtype) and the bare denoiser with a
gradient to its input (the limit: no adapter can need less), in turn within each round. Eager at
batch 1, compiled at batch 4; bytes saved for the backward pass, kernels launched in a step, and the
peak of a step with weights, gradients and AdamW.

Without a GPU, bytes and operators of all cases at their real shapes are counted on the meta device
(bf16, Flux unquantised), where tensors have shapes only. Step times are those of the UNets at small
latents on the CPU, good for their ratios alone. The result says so.
Writes `benchmarks/results/families.json`, or `families-shapes.json` (what was counted) and
`families-cpu.json` (what was timed; `--timed` alone: nothing), with every aim that could be judged
and whether it was met.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from _common import Operators, Stopwatch, bytes_saved, write_result
from peft import LoraConfig, PeftConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import DeviceType

from nora_diffusion import NoraConfig
from nora_diffusion.adapter import deferred_factors, iter_nora_layers, joint_cores
from nora_diffusion.families import speed
from nora_diffusion.families.quantise import linears, quantise_layer
from nora_diffusion.families.skeleton import META, skeleton
from nora_diffusion.train.live_memory import LiveMemory

VARIANTS = ("no_adapter", "lora_r16", "nora_64_8")


@dataclass(frozen=True)
class Case:
    """One model at one size.

    Attributes:
        base: hub id whose shipped configs are used.
        latent_side: of the pictures' latents on a GPU.
        checkpointing: recompute activations, as one would on a consumer card.
        quantize: format of the frozen linear layers on a GPU.
    """

    base: str
    latent_side: int
    checkpointing: bool = False
    quantize: str = "none"


CASES = {
    "sd15-512": Case("stable-diffusion-v1-5/stable-diffusion-v1-5", 64),
    "sdxl-1024": Case("stabilityai/stable-diffusion-xl-base-1.0", 128, True),
    "sd35-medium-1024": Case("stabilityai/stable-diffusion-3.5-medium", 128, True),
    "flux-512": Case("black-forest-labs/FLUX.1-dev", 64, True, "nf4"),
    "flux-1024": Case("black-forest-labs/FLUX.1-dev", 128, True, "nf4"),
}
CPU_CASES = ("sd15-512", "sdxl-1024")
RECORDS = {"real_shapes": "families-shapes", "measured": "families-cpu"}  # without a GPU
PEAK_AIMS_GB = {"sd15-512": 4, "sdxl-1024": 8, "flux-512": 9}


class Bench:
    """A denoiser with random weights on the device, and what a step of its family takes."""

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, side: int, quantize: str
    ) -> None:
        self.dtype, self.side, self.quantize = dtype, side, quantize
        self.checkpointing, self.device = case.checkpointing, device
        self.family = skeleton(case.base, self.dtype)
        parts = self.family.components
        with torch.no_grad(), LiveMemory():  # it answers for values that are not there
            conditioning = self.family.encode_prompts(["a photo"])
            pixels = torch.empty(1, 3, 64, 64, device=META)
            channels = self.family.encode_images(pixels).shape[1]
        parts.device = device
        self.denoiser: Any = parts.denoiser
        if device != META:
            fill(self.denoiser, self.quantize, device, self.dtype)
        self.denoiser.requires_grad_(False)
        draw = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, channels, self.side, self.side, generator=draw).to(device)
        self.conditioning = conditioning.apply(
            lambda t: torch.randn(t.shape, generator=draw).to(device, t.dtype)
        )

    def add(self, name: str) -> None:
        """Put one variant's adapter on, in training mode."""
        targets = list(self.family.targets["attention"])
        configs: dict[str, PeftConfig] = {
            "lora_r16": LoraConfig(r=16, target_modules=targets),
            "nora_64_8": NoraConfig(target_modules=targets),
        }
        shapes_only = self.device == META
        if name in configs:
            with deferred_factors() if shapes_only else nullcontext():
                inject_adapter_in_model(configs[name], self.denoiser, low_cpu_mem_usage=shapes_only)
        if shapes_only:  # what PEFT and NoRA do when there are weights
            for _, layer in iter_nora_layers(self.denoiser):
                layer.outer("default").derived = True
            for module in self.denoiser.modules():
                if isinstance(module, LoraLayer):
                    module.lora_A.to(self.dtype)
                    module.lora_B.to(self.dtype)
        self.denoiser.train()
        if self.checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    def remove(self) -> None:
        """Take the adapter off again."""
        for path, module in list(self.denoiser.named_modules()):
            if isinstance(module, BaseTunerLayer):
                self.denoiser.set_submodule(path, module.get_base_layer())
        if hasattr(self.denoiser, "peft_config"):
            del self.denoiser.peft_config
        self.denoiser.requires_grad_(False)
        gc.collect()

    def trained(self) -> list[nn.Parameter]:
        """What the variant at hand trains; nothing for the limit."""
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def loss(self, batch: int) -> Tensor:
        """The loss of one step; for the limit its gradient goes to the latents."""
        latents = self.latents.expand(batch, *self.latents.shape[1:]).contiguous()
        if not self.trained():
            latents.requires_grad_()
        generator = torch.Generator().manual_seed(2)
        conditioning = self.conditioning.repeat(batch)
        return self.family.loss(self.denoiser, latents, conditioning, generator).mean()

    def ahead(self) -> AbstractContextManager[None]:
        """What the recipe has around a forward and backward pass."""
        blocks = speed.repeated_blocks(self.denoiser)
        if any(block._compiled_call_impl is not None for block in blocks):
            return nullcontext()  # they compute their own cores, in the graph
        return joint_cores(self.denoiser)

    def step(self, batch: int) -> None:
        """Forward and backward pass."""
        with self.ahead():
            self.loss(batch).backward()

    def saved_bytes(self) -> int:
        """Kept for the backward pass at batch 1."""

        def forward() -> None:
            with self.ahead():
                self.loss(1)

        return bytes_saved(self.denoiser, forward)


@torch.no_grad()
def fill(model: nn.Module, mode: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device small random weights, quantised layer by layer."""
    generator = torch.Generator(device).manual_seed(0)
    quantised = {name for name, _ in linears(model, mode)} if mode != "none" else set()
    for name, module in list(model.named_modules()):
        module.to_empty(device=device, recurse=False)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                std = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.02
                tensor.normal_(std=std, generator=generator)
        if name in quantised:
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, quantise_layer(module, mode, dtype))


def seconds(bench: Bench, batch: int) -> float:
    """Seconds of one forward and backward pass."""
    elapsed = Stopwatch(bench.device)(lambda: bench.step(batch))
    for parameter in bench.trained():
        parameter.grad = None
    return elapsed


def peak_gb(bench: Bench) -> float:
    """Peak of two training steps on CUDA, with AdamW, in 10^9 bytes, the driver's share aside."""
    optimizer = torch.optim.AdamW(bench.trained(), fused=True) if bench.trained() else None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        bench.step(1)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() / 1e9


def kernels(bench: Bench) -> int:
    """Kernels and copies that one step launches at batch 1 on CUDA."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds(bench, 1)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or [])


def real_shapes(case: Case) -> dict[str, Any]:
    """Bytes and operators of all variants at a case's real shapes, on the meta device."""
    bench = Bench(case, META, torch.bfloat16, case.latent_side, "none")
    found = head(bench)
    for name, row in found["variants"].items():
        bench.add(name)
        row["trained_parameters"] = sum(p.numel() for p in bench.trained())
        with LiveMemory():
            row["saved_for_backward_bytes"] = bench.saved_bytes()
        with LiveMemory() as memory, Operators() as operators:
            memory.ignore([*bench.denoiser.parameters(), *bench.denoiser.buffers()])
            bench.step(1)
        row["held_at_peak_bytes"] = memory.peak  # activations and the trained gradients
        row["operators_per_step"] = operators.count
        bench.remove()
    over_limit(found["variants"])
    return found


def measure(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """All variants of one case, run: on a CPU in float32 at small latents."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side, quantize = (case.latent_side, case.quantize) if on_gpu else (options.cpu_latents, "none")
    bench = Bench(case, device, dtype, side, quantize)
    found = head(bench)
    for name, row in found["variants"].items():
        bench.add(name)
        row["trained_parameters"] = sum(p.numel() for p in bench.trained())
        row["saved_for_backward_bytes"] = bench.saved_bytes()
        if on_gpu:
            row["peak_gb"] = round(peak_gb(bench), 3)
            row["kernels_per_step"] = kernels(bench)
        bench.remove()
    over_limit(found["variants"])
    for label, batch, fast in (("eager_batch_1", 1, False), ("compiled_batch_4", 4, True)):
        if not (fast and options.no_compile):
            times = time_variants(bench, batch, options.rounds, fast)
            for name, run in times.items():
                found["variants"][name][label] = summary(run, times)
    return found


def head(bench: Bench) -> dict[str, Any]:
    """What a bench runs, and an empty row for every variant."""
    return {
        "latents": list(bench.latents.shape),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "quantize": bench.quantize,
        "gradient_checkpointing": bench.checkpointing,
        "variants": {name: {} for name in VARIANTS},
    }


def over_limit(variants: dict[str, dict[str, Any]]) -> None:
    """Add what each variant's bytes are above the limit's."""
    for kind in ("saved_for_backward", "held_at_peak"):
        for row in variants.values():
            if (limit := variants["no_adapter"].get(f"{kind}_bytes")) is not None:
                ratio = row[f"{kind}_bytes"] / limit
                row[f"{kind}_over_limit_percent"] = round(100 * (ratio - 1), 3)


def judge(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The aims of one case; `met` is None where nothing was measured."""
    run = result.get("measured", {}).get("variants", {}).get("nora_64_8", {})
    shapes = result.get("real_shapes", {}).get("variants", {}).get("nora_64_8", run)
    eager, compiled = run.get("eager_batch_1", {}), run.get("compiled_batch_4", {})
    over = [shapes[key] for key in shapes if key.endswith("over_limit_percent")]
    aims = [
        ("eager step at batch 1, ratio to the limit", eager.get("ratio_to_limit"), 1.15),
        ("eager step at batch 1, ratio to LoRA", eager.get("ratio_to_lora"), 1.0),
        ("compiled step at batch 4, ratio to the limit", compiled.get("ratio_to_limit"), 1.05),
        ("compiled step at batch 4, ratio to LoRA", compiled.get("ratio_to_lora"), 1.0),
        ("activation bytes over the limit, percent", max(over, default=None), 1.0),
    ]
    if name in PEAK_AIMS_GB:
        aims.append(("peak of a step, GB", run.get("peak_gb"), PEAK_AIMS_GB[name]))
    return [
        {
            "case": name,
            "aim": aim,
            "at_most": most,
            "measured": found,
            "met": None if found is None else found <= most,
        }
        for aim, found, most in aims
    ]


def time_variants(bench: Bench, batch: int, rounds: int, fast: bool) -> dict[str, list[float]]:
    """Seconds by variant; every round runs all of them, so that load hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            bench.add(name)
            if fast:  # later rounds find the kernels of the first
                speed.compile_blocks(bench.denoiser)
            seconds(bench, batch)  # warm up
            times[name].append(min(seconds(bench, batch) for _ in range(2)))
            for block in speed.repeated_blocks(bench.denoiser):
                block._compiled_call_impl = None
            bench.remove()
    return times


def summary(run: list[float], times: dict[str, list[float]]) -> dict[str, float]:
    """Best time, and the median over rounds of its ratios to the limit and to LoRA."""

    def ratio(to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(run, times[to], strict=True)), 3)

    return {
        "best_s": round(min(run), 4),
        "ratio_to_limit": ratio("no_adapter"),
        "ratio_to_lora": ratio("lora_r16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all the device can run")
    parser.add_argument("--timed", nargs="*", choices=CASES, help="those of them to run, not count")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the timings")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--cpu-latents", type=int, default=16, help="their side without a GPU")
    parser.add_argument("--no-compile", action="store_true", help="eager steps only")
    parser.add_argument("--note", default="", help="what a reader must know about this run")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    note = options.note
    records: dict[str, dict[str, Any]] = {}
    if not on_gpu:
        note = f"No GPU: times are CPU seconds in float32, at small latents. {note}"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NORA_CACHE_DIR"] = cache
        cases = options.cases or tuple(CASES)
        timed = options.timed if options.timed is not None else CASES if on_gpu else CPU_CASES
        jobs = [("measured", name) for name in cases if name in timed]
        if not on_gpu:
            jobs = [("real_shapes", name) for name in cases] + jobs
        for kind, name in jobs:
            try:
                if kind == "real_shapes":
                    result = {kind: real_shapes(CASES[name])}
                else:
                    result = {kind: measure(CASES[name], device, options)}
            except torch.cuda.OutOfMemoryError as error:
                result = {"out_of_memory": str(error).splitlines()[0]}
            print(name, json.dumps(result, indent=1), flush=True)
            record = "families" if on_gpu else RECORDS[kind]
            results = records.setdefault(record, {})
            results[name] = result
            aims = [aim for case, found in results.items() for aim in judge(case, found)]
            # After every part: what was measured is kept if a later one fails.
            print(write_result(record, {**results, "aims": aims}, note.strip()))
            for aim in judge(name, result):
                if aim["met"] is False:
                    print("MISSED", aim["case"], aim["aim"], aim["measured"], "aim", aim["at_most"])
            gc.collect()


if __name__ == "__main__":
    main()
