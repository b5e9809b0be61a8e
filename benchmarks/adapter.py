"""Cost of a NoRA adapter on an SD1.5-shaped UNet, beside LoRA and the adapter-free step.

    python benchmarks/adapter.py [--rounds 5] [--threads 1] [--note TEXT]

Random weights, 32x32 latents, batch 1, float32, the 128 attention projections q/k/v/out. Measured:
deriving the outer factors and reading them from the cache; bytes saved for backward over the frozen
model with a gradient to its input; the training step, rounds interleaved; the adapter file.
CPU seconds stand beside wall seconds: on a machine that does other work, their ratios still hold.
Writes `benchmarks/results/adapter.json`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import bytes_saved, write_result
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from nora_diffusion import NoraConfig, save_adapter
from nora_diffusion.adapter.factors import FactorJob, factorise_many

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def variants() -> dict[str, PeftConfig | None]:
    """Name -> adapter; the one without any is the physical limit."""
    lora = {f"lora_r{r}": LoraConfig(r=r, target_modules=TARGETS) for r in (8, 16, 64)}
    nora = {
        f"nora_64_8_{init}": NoraConfig(r=64, inner_r=8, init=init, target_modules=TARGETS)
        for init in ("orthogonal", "sigma")
    }
    return {"no_adapter": None, **lora, **nora}


def sd15_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=DOWN,
        up_block_types=UP,
    )
    return unet.requires_grad_(False)


def loss_of(model: nn.Module, to_input: bool) -> Tensor:
    """One forward pass; the limit needs a gradient somewhere, so it flows to the latents."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 32, 32, generator=generator).requires_grad_(to_input)
    text = torch.randn(1, 77, 768, generator=generator)
    return model(latents, torch.tensor([500]), text).sample.square().mean()


def timed(call: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def factorisation(unet: nn.Module) -> dict[str, Any]:
    suffixes = tuple("." + target for target in TARGETS)
    weights = [m.weight for n, m in unet.named_modules() if n.endswith(suffixes)]
    jobs = [FactorJob(weight, 64) for weight in weights]
    factorise_many([FactorJob(torch.randn(200, 200), 16)] * 2)  # the libraries' own start-up
    derived, cached = timed(lambda: factorise_many(jobs)), timed(lambda: factorise_many(jobs))
    return {
        "modules": len(jobs),
        "weights_mb": round(sum(w.numel() * 4 for w in weights) / 1e6, 1),
        "derive": derived,
        "from_cache_with_hashing": cached,
    }


def memory(unet: UNet2DConditionModel) -> dict[str, Any]:
    limit = bytes_saved(unet, lambda: loss_of(unet, to_input=True))
    found: dict[str, Any] = {"limit_bytes": limit}
    for name, config in variants().items():
        if config is None:
            continue
        model = get_peft_model(unet, config)
        # As trained (no gradient to the latents), and against the limit on equal terms.
        extra, strict = (
            bytes_saved(model, partial(loss_of, model, to_input)) - limit
            for to_input in (False, True)
        )
        found[name] = {
            "over_limit_percent": round(100 * extra / limit, 3),
            "over_limit_with_input_gradient_percent": round(100 * strict / limit, 3),
        }
        unet = model.unload()
    return found


def steps(unet: UNet2DConditionModel, rounds: int) -> dict[str, Any]:
    """Forward and backward; every round runs all variants, so that load hits them alike."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants()}
    for _ in range(rounds):
        for name, config in variants().items():
            model = unet if config is None else get_peft_model(unet, config)
            limit = config is None
            loss_of(model, limit).backward()
            runs[name].append(timed(lambda m=model, limit=limit: loss_of(m, limit).backward()))
            if config is not None:
                unet = model.unload()

    def summary(name: str, kind: str) -> dict[str, float]:
        times = [run[kind] for run in runs[name]]
        ratios = [
            run[kind] / lora[kind] for run, lora in zip(runs[name], runs["lora_r8"], strict=True)
        ]
        key = kind.removesuffix("_s")
        return {
            f"{key}_min_s": round(min(times), 3),
            f"{key}_ratio_of_min": round(min(times) / min(r[kind] for r in runs["lora_r8"]), 3),
            f"{key}_median_ratio": round(statistics.median(ratios), 3),
        }

    return {name: {**summary(name, "wall_s"), **summary(name, "cpu_s")} for name in runs}


def file_size(unet: UNet2DConditionModel) -> dict[str, int]:
    unet.add_adapter(variants()["nora_64_8_orthogonal"], "subject")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(unet, path, "subject", dtype=torch.float16)
        payload = sum(tensor.nbytes for tensor in load_file(path).values())
        return {"fp16_payload_bytes": payload, "fp16_file_bytes": path.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the step")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--note", default="", help="what a reader must know about this run")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NORA_CACHE_DIR"] = cache
        unet = sd15_unet()
        results = {"factorisation": factorisation(unet)}
        results["saved_for_backward"] = memory(unet)
        results["step_against_lora_r8"] = steps(unet, options.rounds)
        results["file"] = file_size(unet)
    path = write_result("adapter", results, options.note)
    print(path.read_text())


if __name__ == "__main__":
    main()
