"""Peak memory and step time of each family at its real shapes, beside LoRA and no adapter at all.

    python benchmarks/families.py [--cases sd15-512 flux-512 ...] [--rounds 5] [--note TEXT]

Random weights in the shapes of the shipped model configs, bf16 (Flux: nf4), the attention
projections adapted, encoded inputs of the lengths that a run has. Every case runs NoRA (r 64, inner
8), PEFT's LoRA (r 16) and the bare denoiser with a gradient to its input (the limit: no adapter can
need less), in turn within each round. Eager at batch 1, compiled at batch 4; bytes saved for the
backward pass, and on CUDA the peak of a step with weights, gradients and AdamW.

Without a GPU only the UNets run, in float32 at small latents, and the result says so: bytes are
exact for those shapes, times are good for their ratios alone.
Writes `benchmarks/results/families.json`, or `families-cpu.json`.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from _common import bytes_saved, write_result
from peft import LoraConfig, PeftConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nora_diffusion import NoraConfig
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
CPU_LATENT_SIDE = 16


class Bench:
    """A denoiser with random weights on the device, and what a step of its family takes."""

    def __init__(self, case: Case, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.side = case.latent_side if on_gpu else CPU_LATENT_SIDE
        self.quantize = case.quantize if on_gpu else "none"
        self.checkpointing, self.device = case.checkpointing, device
        self.family = skeleton(case.base, self.dtype)
        parts = self.family.components
        with torch.no_grad(), LiveMemory():  # it answers for values that are not there
            conditioning = self.family.encode_prompts(["a photo"])
            pixels = torch.empty(1, 3, 64, 64, device=META)
            channels = self.family.encode_images(pixels).shape[1]
        parts.device = device
        self.denoiser: Any = parts.denoiser
        fill(self.denoiser, self.quantize, device, self.dtype)
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
        if name in configs:
            inject_adapter_in_model(configs[name], self.denoiser)
        self.denoiser.train()
        if self.checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    def remove(self) -> None:
        """Take the adapter off again."""
        for path, module in list(self.denoiser.named_modules()):
            if isinstance(module, BaseTunerLayer):
                self.denoiser.set_submodule(path, module.get_base_layer())
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
    model.requires_grad_(False)


def seconds(bench: Bench, batch: int) -> float:
    """Wall seconds of one forward and backward pass."""
    synchronize = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    bench.loss(batch).backward()
    synchronize()
    elapsed = time.perf_counter() - start
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
        bench.loss(1).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() / 1e9


def measure(case: Case, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    """All variants of one case."""
    bench = Bench(case, device)
    found: dict[str, Any] = {
        "latents": list(bench.latents.shape),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "quantize": bench.quantize,
        "gradient_checkpointing": case.checkpointing,
        "variants": {name: {} for name in VARIANTS},
    }
    for name in VARIANTS:
        bench.add(name)
        row = found["variants"][name]
        row["trained_parameters"] = sum(p.numel() for p in bench.trained())
        row["saved_for_backward_bytes"] = bytes_saved(bench.denoiser, lambda: bench.loss(1))
        if device.type == "cuda":
            row["peak_gb"] = round(peak_gb(bench), 3)
        bench.remove()
    limit = found["variants"]["no_adapter"]["saved_for_backward_bytes"]
    for row in found["variants"].values():
        row["saved_over_limit_percent"] = round(
            100 * (row["saved_for_backward_bytes"] / limit - 1), 3
        )
    for label, batch, fast in (("eager_batch_1", 1, False), ("compiled_batch_4", 4, True)):
        if not fast or compiled:
            times = time_variants(bench, batch, rounds, fast)
            for name, run in times.items():
                found["variants"][name][label] = summary(run, times)
    return found


def time_variants(bench: Bench, batch: int, rounds: int, fast: bool) -> dict[str, list[float]]:
    """Seconds by variant; every round runs all of them, so that load hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            bench.add(name)
            if fast:  # later rounds find the kernels of the first
                speed.compile_blocks(bench.denoiser)
            seconds(bench, batch)  # warm up
            times[name].append(min(seconds(bench, batch) for _ in range(3)))
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
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the timings")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--no-compile", action="store_true", help="eager steps only")
    parser.add_argument("--note", default="", help="what a reader must know about this run")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    note = options.note
    if not on_gpu:
        note = f"No GPU: UNets at {CPU_LATENT_SIDE}x{CPU_LATENT_SIDE} latents in float32. {note}"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NORA_CACHE_DIR"] = cache
        for name in options.cases or (CASES if on_gpu else CPU_CASES):
            try:
                results[name] = measure(
                    CASES[name], device, options.rounds, compiled=not options.no_compile
                )
            except torch.cuda.OutOfMemoryError as error:
                results[name] = {"out_of_memory": str(error).splitlines()[0]}
            print(name, json.dumps(results[name], indent=1), flush=True)
            gc.collect()
    print(write_result("families" if on_gpu else "families-cpu", results, note.strip()))


if __name__ == "__main__":
    main()
