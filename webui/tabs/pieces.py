"""HTML of ours: pictures inside the page, and lists whose buttons call Python.

Values of users go into it through ``as_text`` alone. They are shown by ``gr.HTML`` with its default
template, which takes the value as it is; any other template would be run as a program.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from webui.messages import as_text

ACTIONS_JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-do]');
  if (!button || (button.dataset.ask && !window.confirm(button.dataset.ask))) return;
  trigger('click', { action: button.dataset.do, id: button.dataset.id });
});
element.addEventListener('change', event => {
  const box = event.target.closest('textarea[data-id]');
  if (!box) return;
  box.setAttribute('value', box.value);  // or a later update takes it for the old text
  trigger('input', { id: box.dataset.id, text: box.value });
});
"""


class Action(NamedTuple):
    """A button of a list: the word that Python gets, what is written on it, what it acts on.

    Where there is a question to ``ask``, the page asks it first.
    """

    name: str
    label: str
    id: str
    about: str
    ask: str = ""


def actions(*given: Action) -> str:
    """A row of buttons, told apart for screen readers by what they are about."""
    return '<div class="n-actions">' + "".join(_button(one) for one in given) + "</div>"


def bin_actions(id: str, name: str) -> str:
    """What can be done with a thing in the bin."""
    ask = f"Delete {name} for good? It cannot be put back then."
    return actions(
        Action("restore", "Put back", id, name), Action("purge", "Delete for good", id, name, ask)
    )


def action_list(elem_id: str, label: str) -> gr.HTML:
    """A component whose buttons and text boxes trigger ``click`` and ``input``."""
    return gr.HTML(elem_id=elem_id, label=label, js_on_load=ACTIONS_JS)


def picture(path: Path | None, alt: str) -> str:
    """A picture of ours as part of the page: no copy of it is left in Gradio's cache."""
    if path is None or not path.is_file():
        return '<div class="n-none" aria-hidden="true"></div>'
    kind = "png" if path.suffix == ".png" else "webp"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{as_text(alt)}">'


def card(image: str, title: str, lines: Sequence[str], buttons: str, chosen: bool = False) -> str:
    """One thing in a list: a picture, its name, what is known of it, and what can be done."""
    told = "".join(f"<p>{as_text(line)}</p>" for line in lines if line)
    current = ' aria-current="true"' if chosen else ""
    return (
        f'<li class="n-card"{current}>{image}<div><h3>{as_text(title)}</h3>{told}{buttons}</div>'
        "</li>"
    )


def cards(items: Sequence[str], empty: str) -> str:
    """A list of cards, or what to do where there is none."""
    if not items:
        return note(empty)
    return f'<ul class="n-cards">{"".join(items)}</ul>'


def note(text: str) -> str:
    """A sentence in place of something that is not there."""
    return f'<p class="n-note">{as_text(text)}</p>'


def optional(html: str) -> gr.HTML:
    """Text of an element that takes no room while it is empty."""
    return gr.HTML(html, visible=bool(html))


def told(text: str) -> str:
    """What has just been done, read aloud by screen readers."""
    return f'<p role="status" class="n-told">{as_text(text)}</p>' if text else ""


def day(seconds: float) -> str:
    """A date as people read it, in local time."""
    return time.strftime("%d %b %Y", time.localtime(seconds)).lstrip("0")


def count(number: int, thing: str) -> str:
    """``1 photo``, ``2 photos``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _button(action: Action) -> str:
    asked = f'data-ask="{as_text(action.ask)}" ' if action.ask else ""
    return (
        f'<button type="button" data-do="{action.name}" data-id="{action.id}" {asked}'
        f'aria-label="{as_text(action.label)}: {as_text(action.about)}">{as_text(action.label)}'
        "</button>"
    )
