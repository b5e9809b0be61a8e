"""The update of an adapted layer, ``s U (P Q - P0 Q0) V``: its core, its weight, its LoRA pair."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .ahead import LowRankPair
from .config import timestep_law
from .outer import OuterFactors
from .state import NoraState

_WARNED: set[str] = set()  # adapters whose missing timesteps were warned of


class NoraUpdate(NoraState):
    """What the adapters of one layer add to its weight, common to the adapted layer types."""

    def core(self, adapter_name: str, progress: Tensor | None = None) -> Tensor:
        """Return ``s (P Q - P0 Q0)``: ``(r, r)``, or ``(B, r, r)`` under a timestep law.

        Args:
            adapter_name: The adapter.
            progress: ``t / T (B,)`` in [0, 1]; used only if the adapter has `timestep_rank`.
        """
        P, Q = self.nora_inner_B[adapter_name], self.nora_inner_A[adapter_name]
        law = None if progress is None else timestep_law(self.nora_config[adapter_name])
        active = None if law is None or progress is None else _active(P, progress, *law)

        def masked(left: Tensor) -> Tensor:
            return left if active is None else left * active

        if adapter_name not in self.nora_initial_A:
            core = masked(P) @ Q
        else:
            # P Q - P0 Q0 without the cancellation: exactly zero at the start in every precision.
            initial_P, initial_Q = self.initial_pair(adapter_name)
            core = masked(P - initial_P) @ Q + masked(initial_P) @ (Q - initial_Q)
        scaling = self.scaling[adapter_name]
        return core if scaling == 1 else core * scaling

    def _updates(self) -> list[tuple[OuterFactors, float, Tensor]]:
        """Collect ``(outer pair, dropout, core)``; adapters on one pair sum their small cores."""
        updates: list[tuple[OuterFactors, float, Tensor]] = []
        for name in self._present(self.active_adapters):
            if self.scaling[name] == 0:
                continue
            outer = self.outer(name)
            if not outer.derived:
                self.derive_factors(name)
            if self._progress is None and self.nora_config[name].timestep_rank is not None:
                _warn_about_missing_progress(name)
            core = self._joint_core(name)
            core = self.core(name, self._progress) if core is None else core
            dropout = self.nora_config[name].dropout if self.training else 0.0
            for index, (other, p, summed) in enumerate(updates):
                if other is outer and p == dropout:
                    updates[index] = (outer, dropout, summed + core)
                    break
            else:
                updates.append((outer, dropout, core))
        return updates

    # ---- as matrices -----------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update in the base weight's layout and the inner pair's dtype.

        Under a timestep law it is taken at the full inner rank.
        """
        return self.from_matrix(self._delta_matrix(adapter)).to(self.nora_inner_B[adapter].dtype)

    @torch.no_grad()
    def _delta_matrix(self, adapter: str) -> Tensor:
        """The update ``(out, in)`` in float32."""
        lora_A, lora_B = self._lora_matrices(adapter)
        return lora_B @ lora_A

    @torch.no_grad()
    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the exact LoRA pair ``(lora_A, lora_B)`` with ``lora_B lora_A`` the update.

        No truncation and no SVD: ``lora_A = [Q; Q - Q0] V`` and ``lora_B = s U [P - P0, P0]``,
        float32, of rank ``k`` where ``P0 = 0`` and ``2k`` otherwise. Neither half has the other to
        cancel, so that little is lost where they are cast to half precision. The scale is inside
        (alpha equals rank).

        Returns:
            ``(rank, in)`` and ``(out, rank)``; of a convolution ``(rank, in, kh, kw)`` and
            ``(out, rank, 1, 1)``.
        """
        return self._lora_matrices(adapter)

    def _lora_matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        self.derive_factors(adapter)
        outer = self.outer(adapter)
        # An offloaded base and an outer pair shared with a trained adapter are on two devices.
        place: Any = {"device": outer.outer_B.device, "dtype": torch.float32}
        left = self.nora_inner_B[adapter].to(**place)
        right = self.nora_inner_A[adapter].to(**place)
        if adapter in self.nora_initial_A:
            initial_P, initial_Q = self.initial_pair(adapter)
            initial_P, initial_Q = initial_P.to(**place), initial_Q.to(**place)
            left = torch.cat([left - initial_P, initial_P], dim=1)
            right = torch.cat([right, right - initial_Q], dim=0)
        lora_B = self.scaling[adapter] * (outer.outer_B.float() @ left)
        return right @ outer.outer_A.float(), lora_B

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that the method is additive."""
        return True

    # ---- computed ahead -------------------------------------------------------------------

    def _joint_core(self, adapter_name: str) -> Tensor | None:
        """The core that `joint_cores` has computed, if it has and the scale is still the same."""
        if self._joint_cores is None or torch.compiler.is_compiling():
            return None
        scaling, core = self._joint_cores.get(adapter_name, (None, None))
        return core if scaling == self.scaling[adapter_name] else None

    def _may_keep(self) -> bool:
        """Whether this pass is one whose update need not be computed anew, see `kept_updates`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        configs = [self.nora_config[name] for name in self._present(self.active_adapters)]
        return not any(
            (self.training and config.dropout > 0) or config.timestep_rank is not None
            for config in configs
        )

    def _kept_pair(self, dtype: torch.dtype) -> LowRankPair | None:
        """The sum of the active updates as one low-rank pair; None where there is none."""
        assert self._kept_pairs is not None
        names = [name for name in self._present(self.active_adapters) if self.scaling[name] != 0]
        key = (dtype, *((name, self.scaling[name]) for name in names))
        if key not in self._kept_pairs:
            pairs = [self._lora_matrices(name) for name in names]
            self._kept_pairs[key] = LowRankPair.sum(pairs, dtype) if pairs else None
        return self._kept_pairs[key]


def _warn_about_missing_progress(adapter_name: str) -> None:
    """Say that a timestep law has no effect: once, and not from inside a compiled graph."""
    if torch.compiler.is_compiling() or adapter_name in _WARNED:
        return
    _WARNED.add(adapter_name)
    warnings.warn(
        f"adapter {adapter_name!r} has timestep_rank, but its layers are not told the timestep, so "
        "they run at the full inner rank: call nora_diffusion.denoiser_hooks.attach_timestep_rank("
        "denoiser) once (load_adapter and nora-dreambooth do), or NoraLayer.set_progress",
        stacklevel=3,
    )


def _active(P: Tensor, progress: Tensor, alpha: float, k_min: int) -> Tensor:
    """Mask ``(B, 1, k)`` of the inner dimensions each sample uses (T-LoRA, arXiv 2507.05964).

    The noisier a sample, the fewer: ``k(t) = floor((1 - t/T)^alpha (k - k_min)) + k_min``.
    """
    k = P.shape[1]
    k_min = min(k_min, k)
    clean = 1 - progress.to(device=P.device, dtype=torch.float32).clamp(0, 1)
    # The small term keeps floor() from losing a whole dimension to rounding.
    k_active = torch.floor(clean**alpha * (k - k_min) + 1e-4) + k_min
    return (torch.arange(k, device=P.device) < k_active[:, None, None]).to(P.dtype)
