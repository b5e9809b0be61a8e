"""`nn.MultiheadAttention` taken apart, so that adapters reach its query, key and value projections.

OpenCLIP's towers keep the three in one parameter, `in_proj_weight`, which is no module: an adapter
would find `out_proj` alone. `split_attention` gives every one a linear layer, and
`join_attention` packs them again, so that a merged model is saved in its own layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class SplitAttention(nn.Module):
    """Computes what the given `nn.MultiheadAttention` computes, with its own weights.

    Args:
        packed: one without `bias_k`, `add_zero_attn` and separate key or value widths.

    Raises:
        ValueError: it has one of those.
    """

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        if packed.in_proj_weight is None or packed.bias_k is not None or packed.add_zero_attn:
            raise ValueError(
                "this nn.MultiheadAttention has other widths for keys or values, or bias_k, or "
                "add_zero_attn; only plain self-attention can be taken apart"
            )
        self.num_heads, self.dropout = packed.num_heads, packed.dropout
        self.batch_first = packed.batch_first
        weights = packed.in_proj_weight.chunk(3)
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        parts = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = parts
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends as `nn.MultiheadAttention.forward` does, with the same arguments.

        Returns:
            The output, in the layout of `query`, and None in place of the weights.

        Raises:
            ValueError: the attention weights are asked for.
        """
        if need_weights:
            raise ValueError("SplitAttention gives no attention weights: pass need_weights=False")
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (L, B, D) -> (B, L, D)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(attn_mask, key_padding_mask, q),
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended = attended.transpose(1, 2).flatten(2)
        if not self.batch_first:
            attended = attended.transpose(0, 1)
        return self.out_proj(attended), None

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask that broadcasts to (B, heads, L, L), from torch's two."""
        parts = []
        if mask is not None:
            mask = _additive(mask, q.dtype)
            parts.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(_additive(padding, q.dtype)[:, None, None, :])
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True in a boolean mask of `nn.MultiheadAttention` means: do not look there."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    made = nn.Linear(in_features, out_features, bias is not None, weight.device, weight.dtype)
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made


def split_attention(model: nn.Module) -> int:
    """Replaces every `nn.MultiheadAttention` in `model`; returns how many there were."""
    return _replace(model, nn.MultiheadAttention, SplitAttention)


def join_attention(model: nn.Module) -> int:
    """Undoes `split_attention`, after adapters have been merged or taken off; returns how many.

    Raises:
        ValueError: an adapter is still on one of them.
    """
    return _replace(model, SplitAttention, _packed)


def _replace(model: nn.Module, old: type, make: Callable[[Any], nn.Module]) -> int:
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, old)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


@torch.no_grad()
def _packed(split: SplitAttention) -> nn.MultiheadAttention:
    parts = [getattr(split, name) for name in PROJECTIONS]
    if any(type(part) is not nn.Linear for part in parts):
        raise ValueError("merge or unload the adapters first: peft_model.merge_and_unload()")
    q, k, v, out = parts
    made = nn.MultiheadAttention(
        q.in_features,
        split.num_heads,
        split.dropout,
        bias=q.bias is not None,
        batch_first=split.batch_first,
        device=q.weight.device,
        dtype=q.weight.dtype,
    )
    made.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
    made.out_proj.weight.copy_(out.weight)
    if q.bias is not None:
        made.in_proj_bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
        made.out_proj.bias.copy_(out.bias)
    for name in ("in_proj_weight", "in_proj_bias"):
        if (parameter := getattr(made, name)) is not None:
            parameter.requires_grad_(q.weight.requires_grad)
    for parameter in made.out_proj.parameters():
        parameter.requires_grad_(out.weight.requires_grad)
    return made.train(split.training)
