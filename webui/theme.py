"""How the app looks: Gradio's base theme in our colours, with fonts that come with Gradio."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_md,
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_label_text_weight="600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_500",
    button_primary_text_color="white",
)

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto; }
#brand { display: flex; align-items: baseline; gap: .75rem; padding: .25rem 0; }
#brand h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
#brand p { margin: 0; opacity: .75; }
footer { display: none !important; }
@media (max-width: 640px) { #brand { flex-direction: column; gap: 0; } }
"""

HEADER = (
    '<header id="brand"><h1>NoRA Diffusion</h1>'
    "<p>Teach a diffusion model your subject from a handful of photos.</p></header>"
)
