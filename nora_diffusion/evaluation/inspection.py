"""Which pretrained directions an adapter moved: its cores ``C`` in ``W' = W + U C V``.

``U`` and ``V`` hold directions of each weight's basis, its singular ones unless the adapter chose
others, so entry ``(i, j)`` of ``C`` says how much more of the output direction ``i`` the weight now
makes of the input direction ``j``. Both are orthonormal, so ``|U C V|^2 = |C|^2``: energies need no
base model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nora_diffusion.adapter import Factors, cached_factors, header
from nora_diffusion.adapter.components import components_of, match_components, restored
from nora_diffusion.adapter.factors import DATA_BASES, Basis
from nora_diffusion.adapter.header import AdapterFileError
from nora_diffusion.adapter.loading import add_native, find_files, open_base
from nora_diffusion.adapter.native import (
    Component,
    ModulePair,
    NativeAdapter,
    parse_header,
    parse_native,
)
from nora_diffusion.config import UserError
from nora_diffusion.sampling import adapter_path

Side = Literal["output", "input"]

DIRECTIONS: dict[Basis, tuple[str, str]] = {
    "weight": ("singular", "singular index, 0 the weight's largest"),
    "weight_minor": ("minor", "index among the weight's smallest singular values, 0 their largest"),
    "activation": ("activation", "singular index of the weight times its inputs, 0 the largest"),
    "gradient": ("gradient", "singular index of the gradient, 0 its largest"),
    "random": ("random", "random direction number, in no order"),
}
"""What the directions of a basis are: in a word, and what their number says."""

_NAME = "nora_inspect"
_PROJECTIONS = (
    ("conv", r"conv\w*"),
    ("ff", r"ff|mlp|feed_forward|feedforward|fc\d?|gate_proj|up_proj|down_proj|w\d|linear_\d"),
    ("qkv", r"\w*qkv\w*|c_attn|query_key_value"),
    ("q", r"(to_|add_)?(q|query)(_\w+)?"),
    ("k", r"(to_|add_)?(k|key)(_\w+)?"),
    ("v", r"(to_|add_)?(v|value)(_\w+)?"),
    ("out", r"(to_)?(o|out|dense|c_proj|proj)(_\w+)?|to_add_out"),
)
_ORDER = (
    ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"),
    ("q", "k", "v", "out"),
)
"""What runs in this order, whatever the alphabet says."""
_SHORT = (
    (r"^(unet|transformer|model)\.", ""),
    (r"^(base_model\.)?(model\.)+|^transformer\.(?=h\.)", ""),
    (r"^text_encoder", "te"),
    (r"(?<=\.)(text_model|encoder)\.(?=encoder|layers)", ""),
    (r"(?<=\.)encoder\.(?=layers)", ""),
    (r"single_transformer_blocks\.", "single"),
    (r"transformer_blocks\.", "t"),
    (r"down_blocks\.", "down"),
    (r"up_blocks\.", "up"),
    (r"mid_block", "mid"),
    (r"attentions\.", "a"),
    (r"resnets\.", "r"),
    (r"layers\.", "l"),
    (r"self_attn", "attn"),
    (r"to_out\.0$", "out"),
    (r"to_(?=[qkv]$)", ""),
    (r"_proj$", ""),
)


@dataclass(frozen=True)
class Moved:
    """One adapted module.

    Attributes:
        name: component and module.
        block: the block of the model it lies in.
        projection: q, k, v, qkv, out, ff, conv or other.
        kind: the basis its directions are of, a key of `DIRECTIONS`.
        core: ``s (P Q - P0 Q0) (r, r)`` in float64: output directions by input directions.
        basis: what the outer factors follow from (fingerprint of the weight, r, basis, seed); None
            where data made them.
        factors: its outer factors, where they are known.
        weight_norm: Frobenius norm of the base weight, where the base is at hand.
    """

    name: str
    block: str
    projection: str
    kind: Basis
    core: Tensor
    basis: tuple[str, int, str, int] | None
    factors: Factors | None = None
    weight_norm: float | None = None

    @property
    def energy(self) -> float:
        """``|dW|^2``."""
        return float(self.core.square().sum())

    @property
    def relative_size(self) -> float | None:
        """``|dW| / |W|``, where the base is at hand."""
        return None if self.weight_norm is None else self.energy**0.5 / self.weight_norm

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of how the energy is spread over the update's own directions.

        1 where one pair of directions carries all of it; 0 where nothing moved.
        """
        shares = torch.linalg.svdvals(self.core).square()
        if not float(shares.sum()):
            return 0.0
        shares = shares[shares > 0] / shares.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))

    def same_basis(self, other: Moved) -> bool:
        """Whether two cores stand between the same outer factors."""
        return self.basis is not None and self.basis == other.basis

    def directions(self, side: Side) -> Tensor:
        """Energy ``(r,)`` by direction: rows of the core for outputs, columns for inputs."""
        return self.core.square().sum(dim=1 if side == "output" else 0)


@dataclass(frozen=True)
class Inspection:
    """An adapter's modules, in the order of the file's component and of the model's blocks.

    Attributes:
        path: the file.
        base: name of the base model that the file records.
        modules: what moved where.
    """

    path: Path
    base: str | None
    modules: list[Moved]

    @property
    def energy(self) -> float:
        """``|dW|^2`` of all modules."""
        return sum(module.energy for module in self.modules)

    def by(self, attribute: Literal["block", "projection"]) -> dict[str, float]:
        """Energy by block or by projection, in the order of the modules."""
        found: dict[str, float] = defaultdict(float)
        for module in self.modules:
            found[getattr(module, attribute)] += module.energy
        return dict(found)

    def kinds(self) -> dict[Basis, list[Moved]]:
        """The modules by what their directions are: indices of one kind say nothing of another."""
        found: dict[Basis, list[Moved]] = defaultdict(list)
        for module in self.modules:
            found[module.kind].append(module)
        return dict(found)

    def top(self, count: int = 10) -> list[dict[str, Any]]:
        """The directions that moved most: module, side, basis, index, share of all energy."""
        whole = max(self.energy, 1e-300)
        found = [
            {
                "module": module.name,
                "side": side,
                "basis": module.kind,
                "index": index,
                "share": float(value),
            }
            for module in self.modules
            for side in ("output", "input")
            for index, value in enumerate(module.directions(side) / whole)
        ]
        return sorted(found, key=lambda entry: -entry["share"])[:count]


def inspect(run_or_file: str | Path, base: Any = None) -> Inspection:
    """Read what an adapter moved.

    Args:
        run_or_file: run folder or native file.
        base: its base model, loaded or as `load_pipeline` takes it, for what the file does not
            hold: sizes relative to the weights, outer factors, singular values.

    Raises:
        UserError: there is no such adapter, the file is damaged or a LoRA file, it does not fit the
            base, or its cores need singular values (`init="sigma"`) that are nowhere at hand.
    """
    path = adapter_path(run_or_file)
    try:
        adapter = read_native(path)
        if base is None:
            known = {
                (name, module): (_factors_at_hand(component, pair, module), None)
                for name, component in adapter.components.items()
                for module, pair in component.modules.items()
            }
        else:
            known = _of_base(path, adapter, base)
    except AdapterFileError as error:
        raise UserError(str(error)) from error
    modules: list[Moved] = []
    for name, component in adapter.components.items():
        for module in sorted(component.modules, key=_natural):
            factors, norm = known[name, module]
            place = f"{name}.{module}"
            core = _core(f"{path}: {place}", component, component.modules[module], factors)
            moved = Moved(
                name=place,
                block=block_of(place),
                projection=projection_of(module),
                kind=component.config.basis,
                core=core,
                basis=_basis(component, module, core.shape[0]),
                factors=factors,
                weight_norm=norm,
            )
            modules.append(moved)
    return Inspection(path, adapter.about.get("base"), modules)


def read_native(path: Path) -> NativeAdapter:
    """Contents of a native file.

    Raises:
        AdapterFileError: the file is damaged, or is a LoRA file.
    """
    contents = header.read(find_files(path)[0])
    fields = parse_header(path, contents.metadata)
    if fields is None or fields["kind"] != "native":
        raise AdapterFileError(
            f"{path}: a LoRA file, which has no cores in singular directions; give the native file "
            "(adapter.safetensors) it was exported from"
        )
    return parse_native(path, contents, fields)


def block_of(name: str) -> str:
    """Name of the block a module lies in: everything up to the first number, shortened."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    if "mid_block" in parts:
        number = parts.index("mid_block")
    return shortened(".".join(parts[: number + 1])) if number else shortened(".".join(parts[:2]))


def projection_of(module: str) -> str:
    """What a module computes in its block, by the name it has."""
    parts = [part for part in module.lower().split(".") if not part.isdigit()]
    last = parts[-1]
    if re.search(r"(^|_)(ff|mlp|feed_forward)", ".".join(parts[-3:]).replace(".", "_")):
        return "ff"
    for projection, pattern in _PROJECTIONS:
        if re.fullmatch(pattern, last):
            return projection
    return "other"


def shortened(name: str) -> str:
    """A module's name, short enough for the axis of a picture."""
    for pattern, short in _SHORT:
        name = re.sub(pattern, short, name)
    return name


def _natural(name: str) -> list[Any]:
    """Sorts numbers in a name by their value, and blocks and projections as they run."""
    keys = []
    for part in name.split("."):
        plain = part.removeprefix("to_").removesuffix("_proj")
        order = next((row for row in _ORDER if plain in row), None)
        known = None if order is None else (order[0], order.index(plain))
        keys.append((0, "", int(part)) if part.isdigit() else (1, *(known or (part, 0))))
    return keys


def _core(place: str, component: Component, pair: ModulePair, factors: Factors | None) -> Tensor:
    P, Q = pair.inner_B.double(), pair.inner_A.double()
    k = Q.shape[0]
    if component.config.init == "sigma":
        if factors is None:
            raise UserError(
                f'{place}: with init = "sigma" the core depends on the singular values of the '
                "weight, which are neither in the file nor in the cache; give --base"
            )
        values = factors.singular_values.double().cpu()
        if bool(values[k - 1] > 0):
            root = torch.diag(values.sqrt())
            initial_P, initial_Q = root[:, :k], root[:k]
            if not component.difference:
                P, Q = P - initial_P, Q - initial_Q
            # P Q - P0 Q0 of the differences, without its cancellation
            return component.config.scaling * (P @ (Q + initial_Q) + initial_P @ Q)
    return component.config.scaling * (P @ Q)


def _basis(component: Component, module: str, r: int) -> tuple[str, int, str, int] | None:
    config = component.config
    if config.basis in DATA_BASES:
        return None
    return component.fingerprints[module], r, config.basis, config.seed


def _factors_at_hand(component: Component, pair: ModulePair, module: str) -> Factors | None:
    """Outer factors from the file, or from the cache of this machine."""
    if pair.outer is not None:
        return pair.outer
    config = component.config
    r = pair.inner_A.shape[1]
    return cached_factors(component.fingerprints[module], r, config.basis, config.seed)


def _of_base(
    path: Path, adapter: NativeAdapter, base: Any
) -> dict[tuple[str, str], tuple[Factors, float]]:
    """Outer factors and norms of the weights, by component and module."""
    targets = components_of(open_base(base, adapter))
    matched = match_components(adapter.components, targets, str(path))
    found: dict[tuple[str, str], tuple[Factors, float]] = {}
    with restored(matched.values(), _NAME, always=True):
        for name, layers in add_native(path, adapter, targets, _NAME).items():
            for module, layer in layers.items():
                outer = layer.outer(_NAME)
                factors = Factors(
                    outer.outer_B.float(),
                    outer.outer_A.float(),
                    outer.singular_values.float(),
                    outer.fingerprint,
                )
                norm = float(torch.linalg.matrix_norm(layer.base_matrix().float()))
                found[name, module] = factors, norm
    return found
