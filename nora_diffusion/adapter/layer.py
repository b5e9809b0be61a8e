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
from .update import NoraUpdate


class NoraLayer(NoraUpdate):
    """Forward pass, merging and export, common to the adapted layer types."""

    # ---- forward ---------------------------------------------------------------------------------

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
        if self._kept_pairs is not None and self._may_keep():
            pair = self._kept_pair(x.dtype)
            if pair is None:
                return result
            return self._add_to(result, self._project_in(x, pair.down), pair.up)
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


def _a_core_each(core: Tensor, samples: Tensor) -> Tensor:
    """Match cores ``(B, r, r)`` to the samples of a batch; a single core serves them all."""
    if core.shape[0] not in (1, samples.shape[0]):
        raise ValueError(
            f"set_progress was given {core.shape[0]} values for a batch of {samples.shape[0]} "
            "samples; give one per sample, in the order of the batch"
        )
    return core.expand(samples.shape[0], -1, -1)
