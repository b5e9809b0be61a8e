"""One file a tab: its components, and what they do with the services of ``studio``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradio.components import Component


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
