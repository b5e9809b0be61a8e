"""What `nora plan` says beside what is measured on models that this machine can hold.

    python benchmarks/plan.py [--models mini sd15 smollm2_135m]

Random weights in float32, the attention projections, one sample of 512 tokens or of the model's own
resolution (SD 1.5 at 128 px). Measured: trained numbers, bytes of the written files, of the outer
factors, of AdamW's state after a step, and of what autograd keeps in a forward pass; LoRA by PEFT,
LoRA-XS by PEFT's PSOFT without its constraints, NoRA by this package. CPU seconds of NoRA's
factorisation stand beside the estimate. Writes benchmarks/results/plan.json.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import bytes_saved, write_result
from families import fill
from peft import LoraConfig, PeftConfig, PsoftConfig, get_peft_model_state_dict
from peft.mapping import inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nora_diffusion import NoraConfig
from nora_diffusion.adapter import deferred_factors, derive_factors, iter_nora_layers
from nora_diffusion.adapter.components import restored
from nora_diffusion.adapter.files import save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.families.skeleton import META
from nora_diffusion.planning.methods import Method
from nora_diffusion.planning.plan import Plan, Request, make_plan, measure_speed
from nora_diffusion.planning.steps import StepBytes
from nora_diffusion.targets import Choice, choices_of
from nora_diffusion.train.live_memory import LiveMemory, bytes_of

MODELS = {"mini": {}, "sd15": {"resolution_px": 128}, "smollm2_135m": {"tokens": 512}}
NAME = "default"


def measure(source: str, plan: Plan, asked: Request) -> dict[str, dict[str, Any]]:
    """What each method of a plan really takes, by its name."""
    (choice,) = choices_of(source, "attention")
    loss = real_step(choice, asked)
    choice.model.requires_grad_(False)
    found: dict[str, dict[str, Any]] = {}
    transposed = any(isinstance(module, Conv1D) for module in choice.model.modules())
    for row in plan.rows:
        if transposed and row.method.name == "LoRA-XS":
            continue  # PSOFT takes nn.Linear alone
        with restored([choice.model], NAME, always=True):
            found[row.method.name] = measure_method(choice, row.method, plan, loss)
        gc.collect()
    return found


def measure_method(
    choice: Choice, method: Method, plan: Plan, loss: Callable[[], Tensor]
) -> dict[str, Any]:
    model: Any = choice.model
    names = [target.name for target in plan.targets]
    found: dict[str, Any] = {}
    with deferred_factors():
        inject_adapter_in_model(config_of(method, model, names), model, NAME)
    if method.name == "NoRA":
        start = time.process_time()
        derive_factors(model, NAME)
        found["factorise_cpu_seconds"] = round(time.process_time() - start, 2)
    layers = dict(iter_nora_layers(model))
    found["outer_bytes"] = bytes_of(
        t for layer in layers.values() for t in layer.outer(NAME).buffers() if t.ndim > 1
    )
    if method.name == "LoRA-XS":
        found["outer_bytes"] = frozen_bytes(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    found["trained"] = sum(p.numel() for p in trained)
    found["kept_bytes"] = bytes_saved(model, loss)
    # Before the step: on random weights it may well end in NaN, which no file may hold.
    with tempfile.TemporaryDirectory() as folder:
        found |= file_bytes(choice, method, Path(folder))
    optimizer = torch.optim.AdamW(trained)
    loss().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    found["optimizer_bytes"] = bytes_of(states)
    for parameter in trained:
        parameter.grad = None
    return found


def config_of(method: Method, model: nn.Module, names: list[str]) -> PeftConfig:
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    if method.name == "LoRA":
        return LoraConfig(r=method.r, target_modules=names, fan_in_fan_out=transposed)
    if method.name == "LoRA-XS":
        return PsoftConfig(
            r=method.r, psoft_alpha=method.r, target_modules=names, psoft_orth=False,
            psoft_mag_a=False, psoft_mag_b=False, psoft_svd="lowrank", fan_in_fan_out=transposed,
        )  # fmt: skip
    return NoraConfig(r=method.r, inner_r=method.inner_r, target_modules=names)


def frozen_bytes(model: nn.Module) -> int:
    """Of PSOFT's two projections."""
    return bytes_of(
        tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if "psoft" in name and not tensor.requires_grad
    )


def file_bytes(choice: Choice, method: Method, folder: Path) -> dict[str, int]:
    """Bytes of written files; of LoRA the tensors with the names that programs know."""
    model, found = choice.model, {}
    if method.name == "LoRA-XS":
        return {}
    layout = "peft" if choice.family is None else "diffusers"
    for kind, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        file, lora = folder / f"{kind}.safetensors", folder / f"lora-{kind}.safetensors"
        if method.name == "LoRA":
            part = "base_model.model." if choice.family is None else "unet."
            state = get_peft_model_state_dict(model, adapter_name=NAME)
            tensors = {part + name: tensor.to(dtype) for name, tensor in state.items()}
            save_file(tensors, file, {"format": "pt"})
            found[f"lora_{kind}"] = file.stat().st_size
        else:
            save_adapter(model, file, NAME, dtype=dtype)
            export_lora(file, lora, layout, model, dtype)
            found[f"lora_{kind}"] = lora.stat().st_size
        found[f"file_{kind}"] = file.stat().st_size
    return found


def real_step(choice: Choice, asked: Request) -> Callable[[], Tensor]:
    """Random weights in the model, and the loss of a step on random inputs."""
    cpu = torch.device("cpu")
    model: Any = choice.model
    draw = torch.Generator().manual_seed(1)
    if choice.family is None:
        torch.manual_seed(0)
        model.__dict__.update(type(model)(model.config).__dict__)
        ids = torch.randint(0, model.config.vocab_size, (asked.batch, asked.tokens), generator=draw)
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    family, parts = choice.family, choice.family.components
    side = asked.resolution_px or family.resolution_px
    with torch.no_grad(), LiveMemory():  # it answers for values that are not there
        conditioning = family.encode_prompts(["a photo"] * asked.batch)
        shape = family.encode_images(torch.empty(asked.batch, 3, side, side, device=META)).shape
    parts.device = cpu
    fill(model, "none", cpu, torch.float32)
    latents = torch.randn(shape, generator=draw)
    given = conditioning.apply(lambda t: torch.randn(t.shape, generator=draw).to(t.dtype))

    def loss() -> Tensor:
        return family.loss(parts.denoiser, latents, given, torch.Generator().manual_seed(0)).mean()

    return loss


def planned(plan: Plan) -> dict[str, dict[str, Any]]:
    """The same numbers as `measure` gives, from the plan."""
    found = {}
    for row in plan.rows:
        entry: dict[str, Any] = {
            "outer_bytes": row.counted.outer_bytes,
            "trained": row.counted.trained,
            "kept_bytes": row.step.kept if isinstance(row.step, StepBytes) else None,
            "optimizer_bytes": row.optimizer_bytes,
        }
        if row.method.name != "LoRA-XS":
            entry |= {f"file_{kind}": size for kind, size in row.counted.file_bytes.items()}
            entry |= {f"lora_{kind}": size for kind, size in row.counted.lora_bytes.items()}
        found[row.method.name] = entry
    return found


def compare(source: str, asked: Request) -> dict[str, Any]:
    """Plan and measurement of one model side by side, and the largest difference in percent."""
    plan = make_plan(source, asked)
    said, real = planned(plan), measure(source, plan, asked)
    seconds = measure_speed(plan).flops
    methods: dict[str, Any] = {}
    for name, numbers in said.items():
        if name not in real:
            continue
        rows = {
            key: {
                "plan": value,
                "measured": real[name][key],
                "off_percent": off(value, real[name][key]),
            }
            for key, value in numbers.items()
        }
        methods[name] = rows
    return {
        "modules": len(plan.targets),
        "size": plan.size,
        "methods": methods,
        "factorise_cpu_seconds": {
            "estimate": round(plan.factorise_flops / seconds, 2),
            "measured": real["NoRA"]["factorise_cpu_seconds"],
        },
    }


def off(said: float, real: float) -> float:
    """How far a plan is from the measurement, in percent of it."""
    return 0.0 if said == real else round(100 * (said / real - 1), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NORA_CACHE_DIR"] = cache
        for source in args.models:
            results[source] = compare(source, Request(dtype="fp32", **MODELS[source]))
            for name, rows in results[source]["methods"].items():
                for key, row in rows.items():
                    print(f"{source:14} {name:8} {key:16} {row}", flush=True)
            print(source, results[source]["factorise_cpu_seconds"], flush=True)
    print(write_result("plan", results))


if __name__ == "__main__":
    main()
