"""The page: four tabs over one ``Studio``, and the endpoints beside them."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

from webui import api
from webui.studio import Studio
from webui.tabs import adapters, create, subject, train
from webui.theme import HEADER

TABS = {"Subject": subject, "Train": train, "Create": create, "Adapters": adapters}


def build_app(studio: Studio) -> gr.Blocks:
    """The Gradio app; ``serve.serve`` shows it under ``theme.THEME`` and ``theme.CSS``."""
    with gr.Blocks(
        title="NoRA Diffusion",
        analytics_enabled=False,
        fill_width=False,
        delete_cache=(3600, 86400),  # seconds: every hour what is older than a day, and at the end
    ) as app:
        api.add_endpoints(studio)  # first: a handler of a tab would else take the name of one
        gr.HTML(HEADER)
        with gr.Tabs(elem_id="tabs"):
            for name, module in TABS.items():
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}") as tab:
                    refresh = module.build(studio)
                for event in (tab.select, app.load):
                    event(
                        refresh.function,
                        set(refresh.inputs) or None,
                        list(refresh.outputs),
                        api_visibility="private",
                        show_progress="hidden",
                    )
    return app
