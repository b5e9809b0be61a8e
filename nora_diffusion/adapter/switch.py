"""Models as they are without their adapters, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def switched_off(*models: nn.Module) -> Iterator[None]:
    """The base models' own answers, for the time of a ``with`` block.

    Every adapter's scale is 0 meanwhile, at which NoRA skips its arithmetic altogether, so that the
    base's answer is exact; PEFT's own switch would also touch ``requires_grad``.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "scaling"):
                scaling: Any = module.scaling
                kept.append((scaling, dict(scaling)))
                scaling.update(dict.fromkeys(scaling, 0.0))
    try:
        yield
    finally:
        for scaling, before in kept:
            scaling.update(before)
