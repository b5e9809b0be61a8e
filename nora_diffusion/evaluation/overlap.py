"""How two adapters overlap: angles between their directions, and what blending will do to each.

Updates are kept as ``U C V``; the product ``(out, in)`` is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nora_diffusion.config import UserError
from nora_diffusion.evaluation.inspection import Inspection, Moved

_NEGLIGIBLE = 1e-6
"""Of the largest singular value of a core: below it a direction counts as not moved."""


@dataclass(frozen=True)
class Pair:
    """One module that two adapters have.

    Attributes:
        name: component and module.
        block: the block of the model it lies in.
        output_angles: principal angles in degrees between the column spaces of the two updates,
            smallest first.
        input_angles: the same of the row spaces.
        inner: ``<dA, dB>``.
        energies: ``|dA|^2`` and ``|dB|^2``.
        shared: share of B's energy that reads directions A reads and writes directions A writes.
    """

    name: str
    block: str
    output_angles: list[float]
    input_angles: list[float]
    inner: float
    energies: tuple[float, float]
    shared: float

    @property
    def cosine(self) -> float:
        """``<dA, dB> / (|dA| |dB|)``; 0 where one of them is zero."""
        size = (self.energies[0] * self.energies[1]) ** 0.5
        return self.inner / size if size else 0.0


@dataclass(frozen=True)
class Overlap:
    """Two adapters on one base.

    Attributes:
        pairs: the modules that both have.
        energies: ``|dA|^2`` and ``|dB|^2`` over all modules, shared or not.
    """

    pairs: list[Pair]
    energies: tuple[float, float]

    @property
    def cosine(self) -> float:
        """Of the two updates of the whole model."""
        size = (self.energies[0] * self.energies[1]) ** 0.5
        return sum(pair.inner for pair in self.pairs) / size if size else 0.0

    @property
    def interference(self) -> tuple[float, float]:
        """``<dA, dB> / |dA|^2``, and the same of B: how the blend changes each one's own effect.

        0: not at all; 1: it is doubled; -1: it is undone (docs/inspect.md).
        """
        inner = sum(pair.inner for pair in self.pairs)
        first, second = (inner / energy if energy else 0.0 for energy in self.energies)
        return first, second

    @property
    def shared(self) -> float:
        """Share of B's energy that lies in the directions of A."""
        inside = sum(pair.shared * pair.energies[1] for pair in self.pairs)
        return inside / self.energies[1] if self.energies[1] else 0.0


def compare(first: Inspection, second: Inspection) -> Overlap:
    """Compare two adapters module by module.

    Raises:
        UserError: they have no module in common, or stand in different bases of a weight and the
            outer factors of one are not at hand.
    """
    others = {module.name: module for module in second.modules}
    pairs = [_pair(own, others[own.name]) for own in first.modules if own.name in others]
    if not pairs:
        raise UserError(
            f"{first.path} and {second.path} have no module in common, e.g. "
            f"{first.modules[0].name} and {second.modules[0].name}; compare adapters of one base"
        )
    return Overlap(pairs, (first.energy, second.energy))


def _pair(first: Moved, second: Moved) -> Pair:
    outputs, inputs = _grams(first, second)
    A, B = first.core, second.core
    column_A, row_A = _spaces(A)
    column_B, row_B = _spaces(B)
    moved = outputs @ B @ inputs.mT  # B's core between A's outer factors
    inside = column_A.mT @ moved @ row_A
    energy = second.energy
    return Pair(
        name=first.name,
        block=first.block,
        output_angles=_angles(column_A.mT @ outputs @ column_B),
        input_angles=_angles(row_A.mT @ inputs @ row_B),
        inner=float((A * moved).sum()),
        energies=(first.energy, energy),
        shared=float(inside.square().sum()) / energy if energy else 0.0,
    )


def _grams(first: Moved, second: Moved) -> tuple[Tensor, Tensor]:
    """``U_A^T U_B`` and ``V_A V_B^T``: the identity where the two share a basis."""
    if first.same_basis(second):
        one = torch.eye(first.core.shape[0], dtype=torch.float64)
        return one, one
    known = [module.factors for module in (first, second) if module.factors is not None]
    if len(known) < 2:
        raise UserError(
            f"{first.name}: the two adapters have other ranks, seeds or base weights here, and "
            "the outer factors are neither in the files nor in the cache; give --base"
        )
    a, b = known
    if a.outer_B.shape[0] != b.outer_B.shape[0] or a.outer_A.shape[1] != b.outer_A.shape[1]:
        raise UserError(
            f"{first.name}: the two adapters are for weights of other shapes; compare adapters of "
            "one base"
        )
    outputs = a.outer_B.double().cpu().mT @ b.outer_B.double().cpu()
    return outputs, a.outer_A.double().cpu() @ b.outer_A.double().cpu().mT


def _spaces(core: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span the column space and the row space of a core."""
    left, values, right = torch.linalg.svd(core)
    rank = int((values > _NEGLIGIBLE * values[0]).sum())
    return left[:, :rank], right[:rank].mT


def _angles(product: Tensor) -> list[float]:
    if 0 in product.shape:
        return []
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    return torch.rad2deg(torch.arccos(cosines)).tolist()
