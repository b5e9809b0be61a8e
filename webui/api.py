"""The named endpoints for scripts and other programs (docs/api.md)."""

from __future__ import annotations

from webui.studio import Studio


def add_endpoints(studio: Studio) -> None:
    """Add the endpoints; call inside the app's ``gr.Blocks``."""
