"""Serving the app: where, for whom, and what it never does (analytics, files from elsewhere)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from webui.paths import DataFolder
from webui.studio import Studio

UPLOAD_LIMIT = "64mb"


@dataclass(frozen=True)
class Serving:
    """Where the app listens.

    Attributes:
        host: address; the loopback one unless ``--listen`` was given.
        port: TCP port.
        auth: whether a name and password may come in; None: nobody is asked.
        share: also open Gradio's public tunnel.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: Callable[[str, str], bool] | None = None
    share: bool = False


def serve(folder: DataFolder, serving: Serving, *, block: bool = True) -> Studio:
    """Open the data folder and serve the app; with ``block`` until Ctrl-C or SIGTERM."""
    # Read by Gradio: uploads stay inside the data folder.
    os.environ["GRADIO_TEMP_DIR"] = str(folder.part("uploads"))
    from webui.app import build_app
    from webui.theme import CSS, THEME

    studio = Studio.open(folder)
    app = build_app(studio)
    studio.start()
    app.queue(default_concurrency_limit=8, max_size=200)
    app.launch(
        server_name=serving.host,
        server_port=serving.port,
        auth=serving.auth,
        share=serving.share,
        max_file_size=UPLOAD_LIMIT,
        prevent_thread_lock=True,
        quiet=True,
        theme=THEME,
        css=CSS,
        footer_links=[],
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    print(f"NoRA Diffusion is at http://{serving.host}:{serving.port} (data: {folder.root})")
    try:
        if block:
            app.block_thread()
    finally:
        if block:
            app.close()
            studio.close()
    return studio
