"""What a blend of two adapters does to each one's effect on the denoiser's output, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nora_diffusion.adapter.blending import set_weights
from nora_diffusion.adapter.files import adapter_info
from nora_diffusion.denoiser_hooks import load_adapter
from nora_diffusion.families import load_family
from nora_diffusion.families.base import DTYPES, Family, Framing

_SAMPLES = 8
_FULL = "float32"


@torch.no_grad()
def measure_interference(
    first: Path, second: Path, base: str, samples: int = _SAMPLES
) -> tuple[float, float]:
    """Measure how blending changes each adapter's own effect, on that adapter's prompt.

    With ``f`` the denoiser's output at random latents and timesteps, and ``e_A = f(A) - f(none)``
    the effect of A alone, it is ``<f(A + B) - f(A), e_A> / |e_A|^2``: 0 where B leaves A's effect
    alone, 1 where it doubles it, -1 where it undoes it.

    Args:
        first: native file of A.
        second: native file of B.
        base: their base model, as `load_pipeline` takes it.
        samples: latents, each at a random timestep of its own.

    Returns:
        A's, then B's, with the roles exchanged.

    Raises:
        AdapterFileError: a file does not fit the base.
    """
    about = adapter_info(first)
    dtypes = {part["base_dtype"] for part in about["components"].values()}
    dtype = {"float16": "fp16", "bfloat16": "bf16"}.get(dtypes.pop() if dtypes else _FULL, "fp32")
    family = load_family(base, dtype=DTYPES[dtype], device=torch.device("cpu"))
    pipe = family.components.pipeline
    for name, path in (("a", first), ("b", second)):
        load_adapter(pipe, path, name)
    found = []
    for own, other, path in (("a", "b", first), ("b", "a", second)):
        prompt = _prompt(adapter_info(path))
        outputs = [
            _answer(family, pipe, names, prompt, samples) for names in ((), (own,), (own, other))
        ]
        effect, change = outputs[1] - outputs[0], outputs[2] - outputs[1]
        size = float(effect.square().sum())
        found.append(float((change * effect).sum()) / size if size else 0.0)
    return found[0], found[1]


def _prompt(about: dict[str, Any]) -> str:
    words = [str(about[key]) for key in ("trigger", "class_name") if about[key]]
    return " ".join(["a photo of", *(words or ["it"])])


def _answer(family: Family, pipe: Any, names: tuple[str, ...], prompt: str, samples: int) -> Tensor:
    """The denoiser's output under some adapters: on the same latents, noise and timesteps."""
    set_weights(pipe, dict.fromkeys(names, 1.0))
    side = family.resolution_px
    framing = Framing(original_px=(side, side), crop_px=(0, 0), target_px=(side, side))
    given = family.frame(family.encode_prompts([prompt] * samples), [framing] * samples)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    latents = torch.randn(samples, *family.encode_images(pixels).shape[1:], generator=generator)
    denoiser: nn.Module = family.components.denoiser
    answers: list[Tensor] = []
    hook = denoiser.register_forward_hook(lambda _, __, out: answers.append(_first(out)))
    try:
        family.loss(family.components.denoiser, latents, given, generator)
    finally:
        hook.remove()
    return answers[-1].double()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
