"""The README.md of a run folder: what the adapter is, how to use it, how it was made."""

from __future__ import annotations

import json

import torch

from nora_diffusion import __version__
from nora_diffusion.families import built_in_version
from nora_diffusion.train.photos import distinct_subjects, scene_prompts
from nora_diffusion.train.session import Session

PEFT_FOLDER = "peft"
"""Folder of the LoRA in PEFT's own layout, where diffusers cannot load one for the pipeline."""

_LORA = """
The same adapter as a LoRA, for other programs (exact, not an approximation):

```python
{import_lora}from nora_diffusion import load_pipeline

pipe = load_pipeline({base})
{load_lora}
image = pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
image.save("example_lora.png")
```
"""

_CARD = """---
base_model: {base_yaml}
library_name: diffusers
pipeline_tag: text-to-image
instance_prompt: {instance}
tags: [nora, lora, dreambooth, text-to-image]
---
# {title}

A NoRA adapter that teaches `{base_name}` {subjects} from {photos}.

![samples](samples/sheet.png)

Before and after, with the same seeds: [before_after.png](before_after.png).

## Use

In this folder:

```python
from nora_diffusion import load_adapter, load_pipeline

pipe = load_pipeline({base})
load_adapter(pipe, "adapter.safetensors")
image = pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
image.save("example.png")
```
{lora}
## Training

| | |
|---|---|
{table}

All settings: [config.toml](config.toml); the course of the run: [events.jsonl](events.jsonl).

## Limits

Pictures made with it are AI-generated and should be labelled so. It draws what the base model can
draw, from few photos; details of the subject may be wrong. Do not use it to depict a person
without their consent. The licence of the base model applies to what it makes.
"""


def model_card(session: Session) -> str:
    """Text of the model card; its snippets run as they are, in the run folder."""
    cfg, parts = session.cfg, session.family.components
    # A compact file fits the base in the number format it was trained on.
    dtype = "" if parts.dtype == torch.float32 else f", dtype={parts.dtype}"
    base = f"{parts.base!r}{dtype}"
    sampling = {
        "base": base,
        "prompt": repr(scene_prompts(cfg)[0]),
        "steps": cfg.sample.steps,
        "guidance": cfg.sample.guidance,
    }
    count = len(session.inputs.photos)
    names = [f"{one.trigger} {one.class_name}" for one in distinct_subjects(cfg)]
    lora = _LORA.format(**sampling, **_loading(session)) if cfg.output.lora else ""
    card = _CARD.format(
        **sampling,
        base_yaml=json.dumps(parts.base),
        base_name=parts.base,
        instance=json.dumps(f"a {names[0]}"),
        title=", ".join(names),
        subjects=("the subject " if len(names) == 1 else "the subjects ")
        + ", ".join(f"**{name}**" for name in names),
        photos=f"{count} photo" + ("s" if count != 1 else ""),
        lora=lora,
        table=_table(session),
    )
    if dtype:
        card = card.replace("```python\n", "```python\nimport torch\n")
    return card


def _loading(session: Session) -> dict[str, str]:
    """The lines that import and call the loader of the LoRA."""
    if hasattr(session.family.components.pipeline, "load_lora_weights"):
        line = 'pipe.load_lora_weights("pytorch_lora_weights.safetensors")'
        return {"import_lora": "", "load_lora": line}
    folders = {name: f"{PEFT_FOLDER}/{name}" for name in session.models}
    if len(folders) == 1:
        folders = dict.fromkeys(folders, PEFT_FOLDER)
    lines = [
        f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{folder}")'
        for name, folder in folders.items()
    ]
    return {"import_lora": "from peft import PeftModel\n", "load_lora": "\n".join(lines)}


def _table(session: Session) -> str:
    cfg, train, base = session.cfg, session.cfg.train, session.family.components.base
    version = {"base_hash": session.base_hash, **built_in_version(base)}
    name = version.get("base_version", base)
    count = session.processes.count
    processes = f" × {count} processes" if count > 1 else ""
    of_text = f" (text encoder: {cfg.text_encoder.basis})" if cfg.text_encoder.train else ""
    rows = {
        "base": f"`{name}` (SHA-256 {version['base_hash'][:16]}…)",
        "outer rank, inner rank": f"{cfg.adapter.r}, {cfg.adapter.inner_r}",
        "basis, initialisation": f"{cfg.adapter.basis}{of_text}, {cfg.adapter.init}",
        "modules": f"{len(session.parameters) // 2}",
        "trained parameters": f"{sum(p.numel() for p in session.parameters.values()):,}",
        "steps": f"{session.step}",
        "batch": f"{train.batch_size} × {train.gradient_accumulation_steps}{processes}",
        "learning rate": f"{train.learning_rate:g}, {train.lr_schedule}",
        "prior": train.prior,
        "seed": f"{train.seed}",
        "made with": f"nora-diffusion {__version__}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
