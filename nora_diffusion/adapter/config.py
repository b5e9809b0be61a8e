"""`NoraConfig`: what a NoRA adapter is, in PEFT's terms."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from peft import PeftConfig

from .factors import BASES, Basis
from .peft_type import NORA

Init = Literal["orthogonal", "sigma", "gradient"]
INITS: tuple[Init, ...] = ("orthogonal", "sigma", "gradient")


@dataclass
class NoraConfig(PeftConfig):
    """Configuration of a NoRA adapter: ``W' = W + scaling * U (P Q - P0 Q0) V``.

    ``U (out, r)`` and ``V (r, in)`` are frozen and derived from ``W``; ``P (r, inner_r)`` and
    ``Q (inner_r, r)`` are trained: ``2 * r * inner_r`` parameters a module, whatever its width.

    Args:
        r: Outer rank; lowered, with one warning, in modules that are smaller.
        inner_r: Inner rank; lowered to `r` where it is larger.
        scaling: Factor on the update. It does not depend on the ranks.
        dropout: Probability in [0, 1) of zeroing an entry of the ``r`` hidden features.
        init: ``"orthogonal"`` (P0 = 0, Q0 seeded orthonormal rows), ``"sigma"`` (the paper: P0 and
            Q0 are the first columns and rows of the root of the singular values) or ``"gradient"``
            (P0 = 0, Q0 fitted to the data by `fit_start`; until that call as ``"orthogonal"``).
        basis: Where U and V come from: ``"weight"`` (top singular vectors), ``"weight_minor"`` (the
            last), ``"random"``, or, after a call of `fit_basis`, ``"activation"``, ``"gradient"``.
        seed: Seed of everything random in the adapter's initial state.
        timestep_rank: Diffusion only. None, an exponent ``alpha >= 0``, or ``{"alpha": float,
            "k_min": int}``: at progress ``t/T`` only the first
            ``floor((1 - t/T)^alpha (inner_r - k_min)) + k_min`` inner dimensions are active
            (`k_min` is 1 where not given).
        rank_pattern: Module name or regular expression -> `r`, overriding it.
        inner_rank_pattern: Module name or regular expression -> `inner_r`, overriding it.
        target_modules: The modules to adapt: a list of names or of their endings, one regular
            expression of whole names, ``"attention"`` (`attention_projections`) or
            ``"all-linear"``. Adding the adapter puts the names found in place of the last two.
        exclude_modules: Names, or one regular expression, of the modules not to adapt.
        layers_to_transform: Layer indices to adapt; needs `target_modules` to be a list.
        layers_pattern: Name of the list of layers that the indices refer to.
        modules_to_save: Modules trained in full and saved with the adapter.
        bias: Biases to train: ``"none"``, ``"all"`` or ``"nora_only"``.
        init_weights: False starts from random inner factors, which changes the model's output.

    Raises:
        ValueError: A field is outside what is named above.
    """

    r: int = 64
    inner_r: int = 8
    scaling: float = 1.0
    dropout: float = 0.0
    init: Init = "orthogonal"
    basis: Basis = "weight"
    seed: int = 0
    timestep_rank: float | dict[str, Any] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    inner_rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        """Check every field, and bring names to the form PEFT expects."""
        super().__post_init__()
        self.peft_type = NORA
        # PEFT matches names against sets, and JSON gives lists.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_ranks()
        self._check_choices()
        self._check_layers()
        timestep_law(self)

    def _check_ranks(self) -> None:
        ranks = {"r": self.r, "inner_r": self.inner_r}
        for name in ("rank_pattern", "inner_rank_pattern"):
            pattern = cast("dict[str, int]", getattr(self, name) or {})
            setattr(self, name, pattern)
            ranks |= {f"{name}[{key!r}]": value for key, value in pattern.items()}
        for name, value in ranks.items():
            if not _is_int(value) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}")

    def _check_choices(self) -> None:
        choices = {"init": INITS, "basis": BASES, "bias": ("none", "all", "nora_only")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {given!r}")
        if not _is_number(self.scaling) or not math.isfinite(self.scaling):
            raise ValueError(f"`scaling` must be a finite number, got {self.scaling!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout!r}")
        if not _is_int(self.seed):
            raise ValueError(f"`seed` must be an integer, got {self.seed!r}")

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str; pass a list of "
                        "module names, or put the layer indices into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )


def timestep_law(config: NoraConfig) -> tuple[float, int] | None:
    """Return ``(alpha, k_min)`` of a config's `timestep_rank`, or None where it is off.

    Raises:
        ValueError: `timestep_rank` is malformed.
    """
    given = config.timestep_rank
    if given is None:
        return None
    fields: dict[str, Any] = given if isinstance(given, dict) else {"alpha": given}
    alpha: Any = fields.get("alpha")
    k_min: Any = fields.get("k_min", 1)
    known = set(fields) <= {"alpha", "k_min"}
    if not known or not _is_number(alpha) or not _is_int(k_min) or alpha < 0 or k_min < 0:
        raise ValueError(
            "`timestep_rank` must be None, an exponent of at least 0, or a dict with `alpha` and "
            f"an optional integer `k_min` of at least 0, got {given!r}"
        )
    if k_min > config.inner_r:
        raise ValueError(
            f"`timestep_rank` has k_min={k_min}, which is above inner_r={config.inner_r}"
        )
    return float(alpha), k_min


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
