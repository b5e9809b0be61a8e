"""What ``target_modules="attention"`` means: the projections into and out of every attention.

A linear layer is one of them if it lies in an attention module and is named like a projection.
Both are conventions that models of every kind follow; a table of model types would be out of date
with each new one.
"""

# torch's own annotations are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import re
from collections import Counter
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .components import adaptable_modules

ATTENTION = "attention"

# LlamaAttention, T5LayerSelfAttention; not CrossAttnDownBlock2D, which holds far more.
_CLASS = re.compile(r"Attention\d*$")
# self_attn, attn1, EncDecAttention; not the list "attentions" of whole blocks.
_ATTRIBUTE = re.compile(r"\w*?(attn|attention)_?\d*", re.IGNORECASE)
# In to_q, add_k_proj, query_key_value, to_qkv_mlp_proj, kv_a_proj_with_mqa, Wqkv, out_lin, wo ...
_PROJECTION = re.compile(r"w?(q?k?vz?|q?k|q|o)|quer(y|ies)|keys?|values?|out|output", re.IGNORECASE)
_NAMES = ("c_attn", "c_proj", "dense", "proj", "projection", "in_proj")
_LISTED = 12  # kinds of linear layers that an error message names


def attention_projections(model: nn.Module) -> dict[str, nn.Module]:
    """Find the projections of a model's attention layers: query, key, value and output.

    They may be fused (``qkv``, ``c_attn``), and there may be more of a kind (``add_q_proj``).
    torch's own `nn.MultiheadAttention`, whose projections are no modules that are called, is one
    target as a whole.

    Args:
        model: Any model, adapted or not.

    Returns:
        The modules, in the model's order, by the name they have without adapters.

    Raises:
        ValueError: There is none.
    """
    found: dict[str, nn.Module] = {}
    attention: dict[str, bool] = {}  # by module name: it is attention, or inside of it
    inside = ""  # a torch attention, and the dot after it
    for name, module in adaptable_modules(model).items():
        parent, _, child = name.rpartition(".")
        base = cast(Any, module).get_base_layer() if _is_adapted(module) else module
        attention[name] = (
            attention.get(parent, False)
            or _ATTRIBUTE.fullmatch(child) is not None
            or _CLASS.search(type(base).__name__) is not None
        )
        if inside and name.startswith(inside):
            continue
        if isinstance(base, nn.MultiheadAttention):
            found[name], inside = module, f"{name}."
        elif attention.get(parent, False) and _is_linear(base) and _is_projection(name):
            found[name] = module
    if not found:
        raise ValueError(_none_found(model))
    return found


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)


def _is_linear(module: nn.Module) -> bool:
    # The quantised ones of several libraries are no subclasses of torch's.
    return isinstance(module, Conv1D) or hasattr(module, "in_features")


def _is_projection(name: str) -> bool:
    """Whether the last part of a module's name, numbers aside, is that of a projection."""
    last = next(part for part in reversed(name.split(".")) if not part.isdigit())
    words = re.findall(r"[a-z]+", last, re.IGNORECASE)
    if "gate" in words:
        return False
    return last in _NAMES or any(_PROJECTION.fullmatch(word) for word in words)


def linear_layers_told(model: nn.Module) -> str:
    """Kinds of linear layers in a model and how many there are of each, for an error message."""
    kinds = Counter(
        re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name)
        for name, module in adaptable_modules(model).items()
        if _is_linear(module)
    )
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(_LISTED))
    more = f" and {len(kinds) - _LISTED} other kinds" if len(kinds) > _LISTED else ""
    return f"Its linear layers are: {listed or 'none'}{more}."


def _none_found(model: nn.Module) -> str:
    return (
        f'target_modules="{ATTENTION}": Target modules not found in this {type(model).__name__}. '
        "Looked for linear layers named like projections (q, k, v, o, qkv, query, key, value, out, "
        f'{", ".join(_NAMES)}) inside modules whose class name ends with "Attention" or whose own '
        f'name ends with "attn" or "attention". {linear_layers_told(model)} '
        'Name those to adapt in target_modules, or give "all-linear"'
    )
