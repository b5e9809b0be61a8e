"""The methods that are compared: NoRA's variants, and PEFT's own on the same linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, OFTConfig, PeftConfig, PsoftConfig

from nora_diffusion.adapter.factors import DATA_BASES

RATES = {
    "nora": (2e-3, 6e-3, 2e-2, 6e-2),
    "low_rank": (6e-4, 2e-3, 6e-3, 2e-2),
    "orthogonal": (2e-3, 6e-3, 2e-2, 6e-2),
}
"""Learning rates that are tried, by kind of method: as many for each."""

TARGETS = ("attention", "feed_forward")
"""Linear layers alone: not every method that is compared can adapt a convolution."""


@dataclass(frozen=True)
class Method:
    """An adaptation method.

    Attributes:
        name: in tables.
        rates: learning rates that are tried.
        nora: settings of the run, for a variant of NoRA.
        peft: PEFT's configuration class, for any other method.
        options: its arguments beside the modules.
        targets: kinds of the denoiser's modules that it adapts, as in ``adapter.targets``.
    """

    name: str
    rates: tuple[float, ...]
    nora: dict[str, Any] = field(default_factory=dict)
    peft: Callable[..., PeftConfig] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS

    def build(self, targets: Sequence[str]) -> PeftConfig:
        """PEFT's configuration for modules of these names."""
        assert self.peft is not None, f"{self.name} is no method of PEFT's"
        return self.peft(target_modules=list(targets), **self.options)


def lora(name: str, r: int, **options: Any) -> Method:
    """LoRA, or what PEFT makes of its options, with a scale of 1."""
    given = {"r": r, "lora_alpha": r, **options}
    return Method(name, RATES["low_rank"], peft=LoraConfig, options=given)


def oft(block_size: int) -> Method:
    """Orthogonal fine-tuning: W times a block-diagonal rotation."""
    given = {"r": 0, "oft_block_size": block_size}
    return Method(f"OFT block {block_size}", RATES["orthogonal"], peft=OFTConfig, options=given)


def psoft(name: str, r: int, **options: Any) -> Method:
    """A trained core between frozen principal directions, orthogonal or (LoRA-XS) free."""
    rates = RATES["nora" if options else "orthogonal"]
    given = {"r": r, "psoft_alpha": r, **options}
    return Method(name, rates, peft=PsoftConfig, options=given)


FREE_CORE = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}

BASELINES = (
    *(lora(f"LoRA r {r}", r) for r in (1, 2, 4, 16, 64)),
    lora("DoRA r 4", 4, use_dora=True),
    lora("PiSSA r 4", 4, init_lora_weights="pissa"),
    oft(8),
    # 22 x 22 = 484 numbers, where NoRA 32/8 has 512.
    psoft("LoRA-XS r 22", 22, **FREE_CORE),
    psoft("PSOFT r 32", 32),
)


def nora(
    r: int = 32,
    inner_r: int = 8,
    basis: str = "weight",
    init: str = "orthogonal",
    alpha: float | None = None,
    text_basis: str | None = None,
    text_ranks: tuple[int, int] | None = None,
    ratio: float = 1.0,
) -> Method:
    """A variant of NoRA.

    ``alpha`` is the exponent of its timestep law. ``text_basis`` is the basis in the text encoder;
    without it that of the denoiser, or the weight's for one that is fitted to pictures;
    ``text_ranks`` are its ranks, without them those of the denoiser. ``ratio`` is the learning rate
    of P, which is searched, over that of Q.
    """
    text_r, text_inner_r = text_ranks or (r, inner_r)
    law = "" if alpha is None else f", alpha {alpha:g}"
    law += "" if text_basis is None else f", text {text_basis}"
    law += "" if ratio == 1 else f", Q at 1/{ratio:g}"
    given = {
        "adapter.r": r, "adapter.inner_r": inner_r, "adapter.basis": basis, "adapter.init": init,
        "text_encoder.r": text_r, "text_encoder.inner_r": text_inner_r,
        "train.loraplus_lr_ratio": ratio,
        "text_encoder.basis": text_basis or ("weight" if basis in DATA_BASES else basis),
    }  # fmt: skip
    if alpha is not None:
        given["adapter.timestep_rank"] = alpha
    return Method(f"NoRA {r}/{inner_r} {basis} {init}{law}", RATES["nora"], nora=given)


PAPER = nora(init="sigma")
"""As the paper has it: principal directions of the weight, started from its singular values."""

FITTED = nora(init="gradient")
"""The paper's basis with the fitted start, which costs no byte of a file."""

SPLIT = nora(init="gradient", text_basis="random")
"""The fitted start on the weight's directions in the denoiser, and on random ones in its text
encoder, as shipped but for the ranks."""

TWO_RATES = nora(init="gradient", text_basis="random", ratio=3.0)
"""The same with Q at a third of P's learning rate, as in LoRA+."""

WIDER = nora(r=64, inner_r=4, init="gradient", text_basis="random")
"""As many numbers spread over twice the directions: mini's config."""

WIDEST = nora(r=128, inner_r=2, init="gradient", text_basis="random")
"""And over four times as many."""


def only(kind: str, method: Method) -> Method:
    """A method on one kind of the denoiser's modules."""
    return replace(method, name=f"{method.name}, {kind.replace('_', '-')}", targets=(kind,))


FEED_FORWARD = only(
    "feed_forward",
    nora(r=160, inner_r=8, init="gradient", text_basis="random", text_ranks=(64, 4)),
)
"""As many numbers as in ``WIDER``, all of the denoiser's in its feed-forward layers, which are 160
wide on their narrow side: every one of W's directions."""

LORA_FEED_FORWARD = tuple(only("feed_forward", lora(f"LoRA r {r}", r)) for r in (2, 16))
"""LoRA on the same modules: of r 2 it has as many numbers."""

_BASES = ("weight", "weight_minor", "activation", "gradient", "random")
_INITS = ("orthogonal", "sigma", "gradient")
VARIANTS = (
    *(nora(basis=basis, init=init) for basis in _BASES for init in _INITS),
    *(nora(init=init, alpha=1.0) for init in _INITS),
)
