"""The frozen outer pair as a module, shared by all adapters of one spec on one layer."""

# PEFT's and torch's own annotations are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .factors import DATA_BASES, Basis, Factors


class OuterSpec(NamedTuple):
    """What the outer factors of a given weight depend on."""

    r: int
    basis: Basis
    seed: int


class OuterFactors(nn.Module):
    """``U (out, r)`` and ``V (r, in)`` of one module.

    Adapters of one spec hold the *same* instance, so they share the tensors and keep sharing them
    through every move of device or dtype (a module is moved once, however many names it has).
    The buffers are saved by PEFT only for the bases that cannot be derived from the weight again.

    Attributes:
        spec: Outer rank after clamping, basis and seed.
        derived: False until the factors are known.
        native: The factors come from the weight this layer has now, not from a file.
        fingerprint: Digest of the weight they come from; empty until known.
    """

    outer_B: Tensor
    outer_A: Tensor
    singular_values: Tensor

    def __init__(
        self,
        spec: OuterSpec,
        out_features: int,
        in_features: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.spec = spec
        self.derived = False
        self.native = True
        self.fingerprint = ""
        saved = spec.basis in DATA_BASES
        r = spec.r
        empty: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("outer_B", torch.zeros(out_features, r, **empty), persistent=saved)
        self.register_buffer("outer_A", torch.zeros(r, in_features, **empty), persistent=saved)
        self.register_buffer(
            "singular_values", torch.zeros(r, device=device, dtype=torch.float32), persistent=saved
        )

    @property
    def shareable(self) -> bool:
        """Whether another adapter of this spec may use the pair: not if data shaped it."""
        return self.spec.basis not in DATA_BASES

    def assign(self, factors: Factors, device: torch.device, native: bool) -> None:
        """Take over factors, in the dtype the buffers have and on `device`.

        Raises:
            ValueError: The factors do not have the shape of this module.
        """
        for name in ("outer_B", "outer_A", "singular_values"):
            ours, theirs = getattr(self, name), getattr(factors, name)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"outer factors for r={self.spec.r} must have {name} of shape "
                    f"{tuple(ours.shape)}, got {tuple(theirs.shape)}"
                )
            setattr(self, name, theirs.to(device=device, dtype=ours.dtype))
        self.fingerprint = factors.fingerprint
        self.native = native
        self.derived = True

    def extra_repr(self) -> str:
        """Show the spec and the shapes."""
        state = "" if self.derived else ", not derived yet"
        shapes = f"U {tuple(self.outer_B.shape)}, V {tuple(self.outer_A.shape)}"
        return f"{shapes}, basis={self.spec.basis}, seed={self.spec.seed}{state}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        state_dict, prefix = args[:2]
        if prefix + "outer_A" in state_dict:
            self.derived = True
            self.native = False


class OuterView(Mapping[str, Tensor]):
    """Adapter name -> one tensor of its outer pair, read from the layer at every look-up."""

    def __init__(self, outers: nn.ModuleDict, tensor: str):
        self._outers = outers
        self._tensor = tensor

    def __getitem__(self, adapter_name: str) -> Tensor:
        return getattr(self._outers[adapter_name], self._tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._outers)

    def __len__(self) -> int:
        return len(self._outers)
