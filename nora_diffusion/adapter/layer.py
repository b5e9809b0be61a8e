"""The adapted layers: ``W' = W + s U (P Q - P0 Q0) V`` beside a frozen base layer."""

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from . import base_weight
from .config import timestep_law
from .outer import OuterFactors
from .state import NoraState

_WARNED: set[str] = set()  # adapters whose missing timesteps were warned of


class NoraLayer(NoraState):
    """Forward pass, merging and export, common to the adapted layer types."""

    # ---- the update ------------------------------------------------------------------------------

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
            core = self.core(name, self._progress)
            dropout = self.nora_config[name].dropout if self.training else 0.0
            for index, (other, p, summed) in enumerate(updates):
                if other is outer and p == dropout:
                    updates[index] = (outer, dropout, summed + core)
                    break
            else:
                updates.append((outer, dropout, core))
        return updates

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and add the updates of the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for outer, dropout, core in self._updates():
            # Right to left, so that the product (out, in) is never formed. V is frozen, so backward
            # needs x V^T and not x: it is the factors that are cast to the input's dtype, never the
            # input, and dropout falls on the hidden features.
            hidden = self._project_in(x, outer.outer_A.to(x.dtype))
            if dropout > 0:
                hidden = F.dropout(hidden, dropout)
            hidden = self._mix(hidden, core.to(hidden.dtype), x.shape[0])
            result = self._add_to(result, hidden, outer.outer_B.to(hidden.dtype))
        return result

    @abstractmethod
    def _project_in(self, x: Tensor, V: Tensor) -> Tensor:
        """Map an input to the ``r`` hidden features."""

    @abstractmethod
    def _mix(self, hidden: Tensor, core: Tensor, samples: int) -> Tensor:
        """Apply the core ``(r, r)``, or one ``(B, r, r)`` of its own to every sample."""

    @abstractmethod
    def _add_to(self, result: Tensor, hidden: Tensor, U: Tensor) -> Tensor:
        """Map the hidden features to the layer's output, and add them to what is there."""

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """Turn an input into rows of features ``(N, features)``, for `fit_basis`."""

    def per_column(self, features: Tensor) -> Tensor:
        """Spread values of input features ``(features,)`` over the matrix's columns ``(in,)``."""
        return features

    # ---- weights ---------------------------------------------------------------------------------

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

        No truncation and no SVD: ``lora_A = [Q; Q0] V`` and ``lora_B = s U [P, -P0]``, float32, of
        rank ``k`` where ``P0 = 0`` and ``2k`` otherwise. The scale is inside (alpha equals rank).

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
            left = torch.cat([left, -initial_P.to(**place)], dim=1)
            right = torch.cat([right, initial_Q.to(**place)], dim=0)
        lora_B = self.scaling[adapter] * (outer.outer_B.float() @ left)
        return right @ outer.outer_A.float(), lora_B

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that the method is additive."""
        return True

    # ---- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base weight, at the full inner rank.

        A copy of the original weight is kept on the CPU until `unmerge`.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before it is written.
            adapter_names: Adapters to merge; the active ones by default.

        Raises:
            ValueError: The merged weight is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self._backup and not base_weight.is_intact(self, self._backup):
            self._backup = None  # another adapter was merged in between: there is no way back to it
        original = self._backup.weight if self._backup else base_weight.read(self)
        # From the original in one sum, so that several merges round only once.
        added = [*self.merged_adapters, *names] if self._backup else names
        merged = self._plus_deltas(original, added, 1.0)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                "broken"
            )
        if self._backup is None and not self.merged:
            self._backup = base_weight.take_backup(self)
        base_weight.write(self, merged)
        if self._backup:
            self._backup.mark = base_weight.mark(self)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight from the copy, to the last bit.

        If something else has changed the weight since the merge, the updates are subtracted.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._backup and base_weight.is_intact(self, self._backup):
            base_weight.restore(self, self._backup)
        else:
            names = self._present(self.merged_adapters)
            base_weight.write(self, self._plus_deltas(base_weight.read(self), names, -1.0))
        self._backup = None
        self.merged_adapters.clear()

    def _plus_deltas(self, weight: Tensor, names: list[str], sign: float) -> Tensor:
        """``weight + sign * sum of updates``, summed in float32, on the base layer's device."""
        device = self.base_device()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(device=device, dtype=dtype, copy=True)
        for name in names:  # in place: a merge of large weights is bound by memory
            total.add_(self.from_matrix(self._delta_matrix(name)).to(device), alpha=sign)
        return total.to(weight.dtype)

    # ---- text ------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """One line an adapter: ranks, scale, basis, init and what is trained."""
        lines: list[str] = []
        if self.quantization_backend is not None:
            lines.append(f"quantization_backend={self.quantization_backend.backend_name!r}")
        for name, config in self.nora_config.items():
            trained = 2 * self.r[name] * self.inner_r[name]
            state = "merged" if name in self.merged_adapters else ""
            state = state or ("active" if name in self.active_adapters else "inactive")
            lines.append(
                f"[{name}] r={self.r[name]}, inner_r={self.inner_r[name]}, "
                f"scaling={self.scaling[name]:g}, basis={config.basis}, init={config.init}, "
                f"{trained} parameters, {state}"
            )
        return "\n".join(lines)


class Linear(NoraLayer):
    """NoRA on `torch.nn.Linear`, on GPT-2's `Conv1D`, and on quantised linear layers."""

    def input_rows(self, x: Tensor) -> Tensor:
        """See `NoraLayer.input_rows`."""
        return x.reshape(-1, x.shape[-1])

    # Products of rows (N, r), not F.linear: of an input of three dimensions that takes and gives
    # views at every product and again in backward, and a small step on a GPU waits for the CPU.

    def _project_in(self, x: Tensor, V: Tensor) -> Tensor:
        return self.input_rows(x).mm(V.t())

    def _mix(self, hidden: Tensor, core: Tensor, samples: int) -> Tensor:
        if core.ndim == 2:
            return hidden.mm(core.t())
        rows = hidden.reshape(samples, -1, hidden.shape[-1])
        return torch.bmm(rows, _a_core_each(core, rows).mT).flatten(0, 1)

    def _add_to(self, result: Tensor, hidden: Tensor, U: Tensor) -> Tensor:
        if hidden.dtype != result.dtype:  # a quantised base under autocast
            return result + hidden.mm(U.t()).reshape(result.shape).to(result.dtype)
        return torch.addmm(self.input_rows(result), hidden, U.t()).reshape(result.shape)


class Conv2d(NoraLayer):
    """NoRA on `torch.nn.Conv2d`: ``V`` is a convolution with ``r`` outputs, ``U`` a 1x1 one."""

    def _conv(self) -> Any:
        return self.get_base_layer()

    @property
    def groups(self) -> int:
        """Groups of the convolution; PEFT's LoRA asks for them when it comes on top of this."""
        return self._conv().groups

    def _matrix_shape(self) -> tuple[int, int]:
        rows, *columns = self._conv().weight.shape
        return rows, math.prod(columns)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Unfold the kernel: ``(out, in * kh * kw)``."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Undo `as_matrix`."""
        return matrix.reshape(self._conv().weight.shape)

    def input_rows(self, x: Tensor) -> Tensor:
        """See `NoraLayer.input_rows`; the features are the channels."""
        return x.movedim(-3, -1).reshape(-1, x.shape[-3])

    def per_column(self, features: Tensor) -> Tensor:
        """See `NoraLayer.per_column`."""
        return features.repeat_interleave(self.in_features // features.shape[0])

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """See `NoraLayer.lora_factors`."""
        lora_A, lora_B = super().lora_factors(adapter)
        return lora_A.reshape(-1, *self._conv().weight.shape[1:]), lora_B[:, :, None, None]

    def _project_in(self, x: Tensor, V: Tensor) -> Tensor:
        conv = self._conv()
        # The base layer's own method, for its stride, dilation and every padding mode.
        return conv._conv_forward(x, V.reshape(-1, *conv.weight.shape[1:]), None)

    def _mix(self, hidden: Tensor, core: Tensor, samples: int) -> Tensor:
        if core.ndim == 2:
            return F.conv2d(hidden, core[:, :, None, None])
        pixels = hidden.flatten(2)
        return torch.bmm(_a_core_each(core, pixels), pixels).reshape(hidden.shape)

    def _add_to(self, result: Tensor, hidden: Tensor, U: Tensor) -> Tensor:
        return result + F.conv2d(hidden, U[:, :, None, None]).to(result.dtype)


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


def _a_core_each(core: Tensor, samples: Tensor) -> Tensor:
    """Match cores ``(B, r, r)`` to the samples of a batch; a single core serves them all."""
    if core.shape[0] not in (1, samples.shape[0]):
        raise ValueError(
            f"set_progress was given {core.shape[0]} values for a batch of {samples.shape[0]} "
            "samples; give one per sample, in the order of the batch"
        )
    return core.expand(samples.shape[0], -1, -1)
