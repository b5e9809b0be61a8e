"""The tab "Create"."""

from __future__ import annotations

import gradio as gr

from webui.studio import Studio
from webui.tabs import Refresh


def build(studio: Studio) -> Refresh:
    """Make the tab's components; call inside its ``gr.Tab``."""
    shown = gr.Markdown("Nothing here yet.")

    def refresh(request: gr.Request) -> str:
        return "Nothing here yet."

    return Refresh(refresh, [shown])
