"""The tabs: their components, and what they do with the services of ``studio``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradio.blocks import Block
from gradio.components import Component

Values = Mapping[Component, Any]
"""What the components of a page hold, as a handler is given it."""

Updates = dict[Block, Any]
"""What a handler answers: values or updates, by component."""


@dataclass(frozen=True)
class Refresh:
    """What a tab shows anew when it is opened, and when the page is loaded.

    Attributes:
        function: takes ``request: gr.Request`` and returns an update for each output.
        outputs: components of the tab.
        inputs: components whose values it takes first, as one dict; none: only the request.
    """

    function: Callable[..., Any]
    outputs: Sequence[Component]
    inputs: frozenset[Component] = frozenset()
