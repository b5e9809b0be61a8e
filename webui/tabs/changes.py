"""Telling a page only what it does not show yet: whatever a person does there must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gradio.components import Component

from webui.tabs import Updates


class Part(NamedTuple):
    """A part of a page.

    Attributes:
        name: what it is remembered by.
        sign: another one where it is to be shown anew.
        make: its components as they are to be shown.
    """

    name: str
    sign: Any
    make: Callable[[], Updates]


def part_of(component: Component, sign: Any, make: Callable[[], Any]) -> Part:
    """A part that is one component; ``make`` gives its value or update."""
    return Part(str(component.elem_id), sign, lambda: {component: make()})


def unseen(parts: Iterable[Part], seen: Mapping[str, Any]) -> tuple[Updates, dict[str, Any]]:
    """Updates for the parts that a page does not show yet, and what it has seen then.

    Args:
        parts: as they are now.
        seen: sign of each part that the page shows, by its name.
    """
    updates: Updates = {}
    signs = dict(seen)
    for part in parts:
        if part.name not in seen or seen[part.name] != part.sign:
            updates |= part.make()
        signs[part.name] = part.sign
    return updates, signs
