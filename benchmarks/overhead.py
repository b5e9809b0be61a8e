"""What an adapter costs apart from training: adding it, inference, merging, switching.

    python benchmarks/overhead.py [--cases mini sd15 ...] [--rounds 5] [--dtype bf16] [--layers N]

Random weights at real shapes (mini has its own): NoRA 64/8 and LoRA r 16 on the attention
projections. Measured for each:

* add: from the bare model to an adapter that is ready, first with nothing in the cache of outer
  factors, then once more from it;
* a forward pass without gradient: bare, with the adapter beside the weights, with NoRA's updates
  kept over passes (`kept_updates`, as in sampling), and merged; the bare pass runs within every
  round, and what counts is the median ratio to it;
* merge and unmerge, with the largest relative error of a weight after both;
* switch: from one of two adapters at hand to the other;
* bytes that the second adapter of a base adds to memory: NoRA's outer factors are shared.

Without a GPU the smaller shapes run, at small inputs, and seconds are those of the process, since
other work may use the cores: good for ratios. `--layers` keeps the first N blocks of each kind of a
transformer that a machine cannot hold whole, and the result says so. Writes
`benchmarks/results/overhead.json` on CUDA, else `overhead-cpu.json`, with `--dtype bf16`, for a CPU
that multiplies it in hardware, `overhead-cpu-bf16.json`.
"""

import argparse
import gc
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Stopwatch, write_result
from peft import LoraConfig, PeftConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import nora_diffusion
from nora_diffusion import NoraConfig
from nora_diffusion.adapter import attention_projections, kept_updates
from nora_diffusion.families import load_family
from nora_diffusion.families.skeleton import skeleton
from nora_diffusion.train.live_memory import LiveMemory

DENOISERS = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 64),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 128),
    "flux": ("black-forest-labs/FLUX.1-dev", 64),
}
ON_CPU, ON_GPU = ("mini", "sd15", "smollm2_135m"), (*DENOISERS, "llama3_8b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_SIDE, CPU_TOKENS, TOKENS = 16, 64, 512


@dataclass
class Subject:
    """A model without an adapter, and one forward pass of it."""

    model: Any
    forward: Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where and how models are measured.

    Attributes:
        device: of the model.
        dtype: of its weights.
        layers: blocks of each kind that a transformer keeps; None: all.
        rounds: of forward passes.
    """

    device: torch.device
    dtype: torch.dtype
    layers: int | None
    rounds: int

    def __str__(self) -> str:
        kept = "" if self.layers is None else f", {self.layers} blocks of each kind"
        return f"{self.dtype}".removeprefix("torch.") + kept


def adapters(targets: list[str]) -> dict[str, PeftConfig]:
    """The adapters that are compared, on the same modules."""
    return {
        "lora_r16": LoraConfig(r=16, target_modules=list(targets)),
        "nora_64_8": NoraConfig(target_modules=list(targets)),
    }


def subject(case: str, setting: Setting) -> Subject:
    """A model of random weights on the device; mini with its own."""
    draw, device, dtype = torch.Generator().manual_seed(1), setting.device, setting.dtype
    if case in ("smollm2_135m", "llama3_8b"):
        folder = Path(nora_diffusion.__file__).parent / "assets" / "shapes" / case
        config = AutoConfig.from_pretrained(folder)
        if setting.layers is not None:
            config.num_hidden_layers = min(setting.layers, config.num_hidden_layers)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tokens = TOKENS if device.type == "cuda" else CPU_TOKENS
        ids = torch.randint(0, 1000, (1, tokens), generator=draw).to(device)
        return Subject(model.eval(), lambda: model(input_ids=ids, use_cache=False).logits)
    if case == "mini":
        family = load_family("mini", dtype=dtype, device=device)
        side = 8
    else:
        base, side = DENOISERS[case]
        family = skeleton(base, dtype)
        side = side if device.type == "cuda" else CPU_SIDE
        if case == "flux" and setting.layers is not None:
            shorten(family.components.denoiser, setting.layers)
        fill(family.components.denoiser, device)
        family.components.device = device
    with torch.no_grad():
        prompts = load_or_shape(family, case)
    denoiser: Any = family.components.denoiser.eval()
    conditioning = prompts.apply(lambda t: torch.randn(t.shape, generator=draw).to(device, t.dtype))
    channels = denoiser.config.in_channels // (4 if case == "flux" else 1)
    latents = torch.randn(1, channels, side, side, generator=draw).to(device)

    def forward() -> Any:
        return family.loss(denoiser, latents, conditioning, torch.Generator().manual_seed(2))

    return Subject(denoiser, forward)


def load_or_shape(family: Any, case: str) -> Any:
    """The conditioning of one prompt; of a skeleton its shapes."""
    if case == "mini":
        return family.encode_prompts(["a photo"])
    with LiveMemory():  # it answers for values that are not there
        return family.encode_prompts(["a photo"])


def shorten(model: nn.Module, layers: int) -> None:
    """Keep the first blocks of each list of them."""
    for name, blocks in model.named_children():
        if isinstance(blocks, nn.ModuleList):
            setattr(model, name, blocks[:layers])


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device small random weights."""
    generator = torch.Generator(device).manual_seed(0)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            std = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.02
            tensor.normal_(std=std, generator=generator)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def tensor_bytes(model: nn.Module) -> int:
    """Of all distinct storages."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def remove(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
    gc.collect()


def each(model: nn.Module, call: Callable[[Any], Any]) -> Callable[[], None]:
    def on_all() -> None:
        for layer in layers(model):
            call(layer)

    return on_all


@torch.no_grad()
def measure(case: str, setting: Setting) -> dict[str, Any]:
    """All numbers of one model."""
    one, watch, rounds = subject(case, setting), Stopwatch(setting.device), setting.rounds
    targets = list(attention_projections(one.model))
    found: dict[str, Any] = {"modules": len(targets), "setting": str(setting)}
    for name, config in adapters(targets).items():
        one.model.requires_grad_(False)

        def add(adapter: str, config: PeftConfig = config) -> Callable[[], Any]:
            return lambda: inject_adapter_in_model(config, one.model, adapter)

        with tempfile.TemporaryDirectory() as cache:
            os.environ["NORA_CACHE_DIR"] = cache
            first = watch(add("first"))
            remove(one.model)
            again = watch(add("first"))
            before = tensor_bytes(one.model)
            watch(add("second"))
        second_bytes = tensor_bytes(one.model) - before
        switches = [
            watch(each(one.model, lambda layer, n=n: layer.set_adapter([n])))
            for n in itertools.islice(itertools.cycle(("second", "first")), 2 * rounds)
        ]
        found[name] = {
            "add_s": round(first, 3),
            "add_from_cache_s": round(again, 3),
            "second_adapter_bytes": second_bytes,
            "switch_s": round(statistics.median(switches), 5),
            **inference(one, watch, rounds),
        }
        remove(one.model)
        print(case, name, found[name], flush=True)
    return found


def inference(one: Subject, watch: Stopwatch, rounds: int) -> dict[str, float]:
    """Forward passes beside the bare model's in every round, and merging."""
    for layer in layers(one.model):  # an update that is not zero, as after training
        for store in ("nora_inner_B", "lora_B"):
            for part in getattr(layer, store, {}).values():
                getattr(part, "weight", part).data.normal_(std=0.01)
    originals = [layer.get_base_layer().weight.clone() for layer in layers(one.model)]
    switch = {on: each(one.model, lambda layer, on=on: layer.enable_adapters(on)) for on in (0, 1)}
    one.forward()
    merge_s, unmerge_s, beside, kept, merged = [], [], [], [], []
    for _ in range(rounds):
        switch[0]()
        bare = watch(one.forward)
        switch[1]()
        beside.append(watch(one.forward) / bare)
        with kept_updates(one.model):
            one.forward()  # which computes them
            kept.append(watch(one.forward) / bare)
        merge_s.append(watch(each(one.model, lambda layer: layer.merge())))
        one.forward()  # the first after a merge finds memory in another state
        merged.append(watch(one.forward) / bare)
        unmerge_s.append(watch(each(one.model, lambda layer: layer.unmerge())))
    errors = [
        float((layer.get_base_layer().weight - weight).norm() / weight.norm())
        for layer, weight in zip(layers(one.model), originals, strict=True)
    ]
    return {
        "forward_beside_over_bare": round(statistics.median(beside), 3),
        "forward_kept_over_bare": round(statistics.median(kept), 3),
        "forward_merged_over_bare": round(statistics.median(merged), 3),
        "merge_s": round(statistics.median(merge_s), 4),
        "unmerge_s": round(statistics.median(unmerge_s), 4),
        "largest_error_after_unmerge": max(errors),
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=sorted({*ON_CPU, *ON_GPU}),
        default=ON_GPU if on_gpu else ON_CPU,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--layers", type=int, help="first blocks of each kind that are kept")
    parser.add_argument("--note", default="", help="what a reader must know about the run")
    args = parser.parse_args()
    setting = Setting(device, DTYPES[args.dtype], args.layers, args.rounds)
    name = "overhead" if on_gpu else "overhead-cpu"
    if not on_gpu and args.dtype == "bf16":
        name += "-bf16"
    results: dict[str, Any] = {}
    for case in args.cases:
        results[case] = measure(case, setting)
        gc.collect()
        print(write_result(name, results, args.note))


if __name__ == "__main__":
    main()
