"""What a person reads when something cannot be done; texts of users and files stay text."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr

from nora_diffusion.config import UserError


def as_text(text: str) -> str:
    """Text for places where the page would read HTML or Markdown: shown letter by letter."""
    return html.escape(text, quote=True)


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a ``UserError`` as a message on the page, without a stack trace in the log."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(as_text(str(error)), print_exception=False) from None

    return call


def owner_of(request: gr.Request | None) -> str:
    """Who asks: the name logged in with, or "" where there are no logins."""
    return (request.username if request is not None else None) or ""
