"""What a NoRA layer holds: per-adapter factors, how they are made and shared, and their scale."""

# PEFT's and torch's own annotations are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import base_weight
from .ahead import JointCores, KeptPairs
from .config import NoraConfig
from .factors import (
    DATA_BASES,
    FactorJob,
    Factors,
    factorise_many,
    fingerprint,
    seeded_orthonormal,
)
from .outer import OuterFactors, OuterSpec, OuterView

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NoraState(BaseTunerLayer, nn.Module):
    """The adapters of one layer. Dictionaries are keyed by the adapter's name.

    Attributes:
        nora_inner_A: ``Q (k, r)``, trained.
        nora_inner_B: ``P (r, k)``, trained.
        nora_outer: The frozen pair ``U, V``; one object for all adapters of one (r, basis, seed).
        nora_initial_A: ``Q0 (k, r)``, only where ``P0 Q0`` is not zero.
        nora_initial_B: ``P0 (r, k)``, likewise.
        r: Outer rank after clamping to the weight's shape.
        inner_r: Inner rank after clamping to `r`.
        scaling: Factor on the update, as `set_scale` and `scale_layer` leave it.
    """

    adapter_layer_names = ("nora_inner_A", "nora_inner_B")
    other_param_names = (
        "nora_outer",
        "nora_initial_A",
        "nora_initial_B",
        "nora_config",
        "r",
        "inner_r",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any):
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.nora_inner_A = nn.ParameterDict()
        self.nora_inner_B = nn.ParameterDict()
        self.nora_outer = nn.ModuleDict()
        self.nora_initial_A = BufferDict()
        self.nora_initial_B = BufferDict()
        self.nora_config: dict[str, NoraConfig] = {}
        self.r: dict[str, int] = {}
        self.inner_r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._backup: base_weight.Backup | None = None
        self._progress: Tensor | None = None
        self._kept_pairs: KeptPairs | None = None
        self._joint_cores: JointCores | None = None
        self.out_features, self.in_features = self._matrix_shape()

    # ---- the base weight as a matrix -------------------------------------------------------------

    def _matrix_shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the weight as a matrix."""
        base: Any = self.get_base_layer()
        if isinstance(base, Conv1D):  # GPT-2 stores the transpose
            columns, rows = base.weight.shape
            return rows, columns
        return base.out_features, base.in_features

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Turn a weight in the base layer's layout into ``(out, in)``."""
        return weight.mT if isinstance(self.get_base_layer(), Conv1D) else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Undo `as_matrix`."""
        return matrix.mT if isinstance(self.get_base_layer(), Conv1D) else matrix

    def base_matrix(self) -> Tensor:
        """Return the frozen weight ``(out, in)``: dequantised, and as it was before any merge."""
        weight = self._backup.weight if self._backup else base_weight.read(self)
        return self.as_matrix(weight.detach()).contiguous()

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the frozen weight, as compact files record it."""
        return fingerprint(self.base_matrix())

    def base_device(self) -> torch.device:
        """Return the device of the base weight."""
        return self._device_and_dtype()[0]

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Device of the base weight, and the float dtype it computes in."""
        base: Any = self.get_base_layer()
        found: tuple[Any, Any] = self._get_base_layer_device_and_dtype(base)
        # HQQ keeps its codes under another name.
        device = found[0] or next(base.parameters()).device
        return device, found[1] if found[1] in _FLOATS else torch.float32

    # ---- adapters --------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: NoraConfig,
        r: int,
        inner_r: int,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter; its outer factors are derived later, side by side with other modules'.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            r: Outer rank for this module, before clamping.
            inner_r: Inner rank for this module, before clamping.
            inference_mode: Start the adapter frozen.
        """
        r = min(r, self.out_features, self.in_features)
        inner_r = min(inner_r, r)
        self.r[adapter_name] = r
        self.inner_r[adapter_name] = inner_r
        self.scaling[adapter_name] = config.scaling
        self.nora_config[adapter_name] = config
        spec = OuterSpec(r, config.basis, config.seed)
        twins = (o for o in self._outers() if o.native and o.shareable and o.spec == spec)
        self.nora_outer[adapter_name] = next(twins, None) or self._new_outer(spec)
        # Float32 whatever the base is: the updates of a bfloat16 pair are lost to rounding.
        device = self.base_device()
        for store, shape in ((self.nora_inner_B, (r, inner_r)), (self.nora_inner_A, (inner_r, r))):
            store[adapter_name] = nn.Parameter(torch.zeros(shape, device=device))
        if self.outer(adapter_name).derived:
            self.reset_inner(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def outer(self, adapter_name: str) -> OuterFactors:
        """Return the outer pair of an adapter, derived or not."""
        return cast(OuterFactors, self.nora_outer[adapter_name])

    @property
    def nora_outer_A(self) -> OuterView:
        """``V (r, in)`` of every adapter; a convolution's kernel is unfolded into ``in``."""
        return OuterView(self.nora_outer, "outer_A")

    @property
    def nora_outer_B(self) -> OuterView:
        """``U (out, r)`` of every adapter."""
        return OuterView(self.nora_outer, "outer_B")

    def initial_pair(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return ``P0, Q0`` of an adapter that is in `nora_initial_A`."""
        pair = self.nora_initial_B[adapter_name], self.nora_initial_A[adapter_name]
        return cast("tuple[Tensor, Tensor]", pair)

    def _outers(self) -> Iterator[OuterFactors]:
        return (self.outer(name) for name in self.nora_outer)

    def _new_outer(self, spec: OuterSpec) -> OuterFactors:
        device, dtype = self._device_and_dtype()
        return OuterFactors(spec, self.out_features, self.in_features, device, dtype)

    # ---- outer factors ---------------------------------------------------------------------------

    def factor_job(
        self, adapter_name: str, statistics: Tensor | None = None, name: str = "weight"
    ) -> FactorJob:
        """Describe the factorisation that an adapter needs (see `factorise`)."""
        spec = self.outer(adapter_name).spec
        return FactorJob(self.base_matrix(), spec.r, spec.basis, spec.seed, statistics, name)

    def adopt_factors(self, adapter_name: str, factors: Factors) -> None:
        """Take factors made of this layer's own weight, for every adapter that shares them.

        The inner pairs of these adapters are set to their initial state.

        Raises:
            ValueError: The factors have another shape.
        """
        outer = self.outer(adapter_name)
        outer.assign(factors, self.base_device(), native=True)
        for name in self.nora_outer:
            if self.outer(name) is outer:
                self.reset_inner(name)

    def set_factors(self, adapter_name: str, factors: Factors) -> None:
        """Give one adapter outer factors that come from a file or from the cache.

        A trained inner pair stays as it is; one that was never initialised is initialised.

        Raises:
            ValueError: The factors have another shape.
        """
        pending = not self.outer(adapter_name).derived
        spec = self.outer(adapter_name).spec
        key = (True, True, spec, factors.fingerprint)
        twins = (
            o for o in self._outers() if (o.shareable, o.derived, o.spec, o.fingerprint) == key
        )
        outer = next(twins, None)
        if outer is None:
            outer = self._new_outer(spec)
            outer.assign(factors, self.base_device(), native=False)
        self.nora_outer[adapter_name] = outer
        if pending:
            self.reset_inner(adapter_name)
        else:
            self._reset_initial(adapter_name)

    def derive_factors(self, adapter_name: str) -> None:
        """Derive the outer factors of one adapter now, unless they are known.

        Raises:
            RuntimeError: The basis needs data, or the base layer has no weights yet.
        """
        outer = self.outer(adapter_name)
        if outer.derived:
            return
        if outer.spec.basis in DATA_BASES:
            raise RuntimeError(
                f"adapter {adapter_name!r} has basis={outer.spec.basis!r}, which is fitted to "
                "data: call nora_diffusion.adapter.fit_basis(model, batches, step) first, or load "
                "a portable adapter file"
            )
        if self.base_device().type == "meta":
            raise RuntimeError(
                f"adapter {adapter_name!r} sits on a base layer without weights (meta device); "
                "load the base model's weights first"
            )
        self.adopt_factors(adapter_name, factorise_many([self.factor_job(adapter_name)])[0])

    # ---- inner pair ------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_inner(self, adapter_name: str) -> None:
        """Set ``P, Q`` to the initial state that the configuration asks for (method, "Init").

        Tensors on the meta device are left alone: a file is about to fill them.
        """
        P, Q = self.nora_inner_B[adapter_name], self.nora_inner_A[adapter_name]
        self._reset_initial(adapter_name)
        if P.is_meta or Q.is_meta:
            return
        if adapter_name in self.nora_initial_A:
            for parameter, initial in zip((P, Q), self.initial_pair(adapter_name), strict=True):
                parameter.copy_(initial)
        else:
            seed = self.nora_config[adapter_name].seed
            purpose = f"inner {self.outer(adapter_name).fingerprint}"
            P.zero_()
            inner_r, r = Q.shape
            Q.copy_(seeded_orthonormal(r, inner_r, seed, purpose).mT.to(Q.dtype))
        if not self.nora_config[adapter_name].init_weights:
            P.add_(torch.randn_like(P) / P.shape[1] ** 0.5)

    def _reset_initial(self, adapter_name: str) -> None:
        """Set ``P0, Q0`` to the first columns and rows of the root of the singular values."""
        for store in (self.nora_initial_A, self.nora_initial_B):
            if adapter_name in store:
                del store[adapter_name]
        values = self.outer(adapter_name).singular_values
        k = self.inner_r[adapter_name]
        # Where the k-th value is zero, sigma would start a pair at the saddle P = Q = 0 and stay.
        if self.nora_config[adapter_name].init != "sigma" or not bool(values[k - 1] > 0):
            return
        root = torch.diag(values.sqrt())
        P = self.nora_inner_B[adapter_name]
        dtype = torch.float32 if P.is_meta else P.dtype
        self.nora_initial_A[adapter_name] = root[:k].to(dtype)
        self.nora_initial_B[adapter_name] = root[:, :k].to(dtype)

    # ---- scale and progress ----------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's factor to ``scale`` times its configured `scaling`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.nora_config[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of every active adapter by ``scale``."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of every active adapter by ``scale``; None restores the configured one.

        Raises:
            ValueError: ``scale`` is zero, which cannot be divided out; use `set_scale`.
        """
        if scale == 0:
            raise ValueError("cannot unscale by 0; use set_scale(adapter, 1.0), or scale=None")
        for name in self._present(self.active_adapters):
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def set_progress(self, progress: Tensor | None) -> None:
        """Tell the layer where in the diffusion each sample of the next batch is.

        Args:
            progress: ``t / T (B,)`` in [0, 1], 1 being pure noise; None for the full inner rank.
                Only adapters with `timestep_rank` use it.
        """
        self._progress = progress

    def bypass(self, bypassed: bool) -> None:
        """Run the base layer alone, leaving alone which parameters require gradients."""
        self._disable_adapters = bypassed

    def _present(self, names: list[str] | str) -> list[str]:
        """Those of the adapters that this layer has."""
        return [name for name in names if name in self.nora_inner_A]

    def cast_inner_to_base(self, adapter_name: str) -> None:
        """Cast an adapter's inner pair, and its initial values, to the base layer's dtype."""
        dtype = self._device_and_dtype()[1]
        stores = (self.nora_inner_A, self.nora_inner_B, self.nora_initial_A, self.nora_initial_B)
        for store in cast("tuple[dict[str, Tensor], ...]", stores):
            if adapter_name in store:
                store[adapter_name] = store[adapter_name].to(dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the base layer's device, keeping the inner pair's dtype."""
        device = device or self.base_device()
        for store in (self.nora_inner_A, self.nora_inner_B):
            if adapter_name in store and not store[adapter_name].is_meta:
                store[adapter_name] = store[adapter_name].to(device)
        if adapter_name in self.nora_outer and device.type != "meta":
            self.nora_outer[adapter_name].to(device)
