"""How the app looks: Gradio's base theme in our colours, with fonts that come with Gradio."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

# Of the weights that come with Gradio, 600 has letters for some words only.
_SANS = LocalFont("IBM Plex Sans", weights=(400, 700))
_MONO = LocalFont("IBM Plex Mono", weights=(400, 700))

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_md,
    font=(_SANS, "ui-sans-serif", "system-ui", "sans-serif"),
    font_mono=(_MONO, "ui-monospace", "Consolas", "monospace"),
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
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
)

CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; margin: 0 auto; }
#brand { display: flex; align-items: baseline; gap: .75rem; padding: .25rem 0; }
#brand h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
#brand p { margin: 0; opacity: .75; }
footer { display: none !important; }
#tabs [role=tab][aria-selected=true] { color: var(--primary-700); }
.dark #tabs [role=tab][aria-selected=true] { color: var(--primary-400); }
#subject-status:not(:has(.n-told)), #adapters-status:not(:has(.n-told)) { display: none; }
.n-note { opacity: .8; margin: .25rem 0; }
.n-told { font-weight: 600; margin: .25rem 0; }
.n-cards, .n-photos, .n-captions, .n-checks { list-style: none; margin: 0; padding: 0; }
.n-card { display: flex; gap: .75rem; padding: .6rem 0; }
.n-card + .n-card { border-top: 1px solid var(--border-color-primary); }
.n-card[aria-current] h3 { color: var(--primary-700); }
.dark .n-card[aria-current] h3 { color: var(--primary-300); }
.n-card > img, .n-card > .n-none { width: 72px; height: 72px; }
.n-card > div:last-child { min-width: 0; flex: 1; }
.n-card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.n-card p, .n-photo p { display: block; margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.n-card img, .n-photo img, .n-caption img { object-fit: cover; border-radius: 6px; flex: none; }
.n-none { border-radius: 6px; flex: none; background: var(--border-color-primary); }
.n-photos { display: grid; gap: .75rem; }
.n-photos { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.n-photo img { width: 100%; aspect-ratio: 1; object-fit: contain; }
.n-photo img { background: var(--background-fill-secondary); }
.n-checks li, .n-photo .n-warning { border-left: 3px solid; padding: .1rem .5rem; }
.n-checks li, .n-photo .n-warning { margin: .25rem 0; }
.n-checks { margin-bottom: .75rem; }
.n-warning { border-color: #b45309 !important; }
.n-unusable { border-color: #dc2626 !important; }
.n-caption { display: flex; gap: .75rem; margin: .5rem 0; align-items: flex-start; }
.n-caption img { width: 64px; height: 64px; }
.n-caption label { flex: 1; min-width: 0; font-size: .85rem; overflow-wrap: anywhere; }
.n-caption textarea { display: block; width: 100%; resize: vertical; padding: .4rem .5rem; }
.n-caption textarea { background: var(--input-background-fill); color: inherit; }
.n-caption textarea, .n-actions button { border: 1px solid var(--border-color-primary); }
.n-caption textarea, .n-actions button { border-radius: 6px; }
.n-actions { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .35rem; }
.n-actions button { min-height: 32px; padding: 0 .7rem; font-size: .85rem; cursor: pointer; }
.n-actions button { background: var(--background-fill-primary); color: inherit; }
.n-actions button:hover { background: var(--background-fill-secondary); }
.n-actions button:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 1px; }
.n-facts { display: flex; flex-wrap: wrap; gap: 1rem; }
.n-facts img { width: 128px; height: 128px; object-fit: cover; border-radius: 6px; }
.n-facts dl { margin: 0; font-size: .9rem; flex: 1 1 14rem; }
.n-facts dl div { display: flex; gap: 1rem; padding: .1rem 0; }
.n-facts dt { opacity: .75; flex: 0 0 7rem; }
.n-facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
#subject-preview figure { margin: 0; }
#subject-preview img { max-width: min(100%, 512px); border-radius: 6px; }
#subject-preview .n-pixels img { width: 256px; image-rendering: pixelated; }
#subject-preview figcaption { font-size: .85rem; opacity: .8; margin-top: .25rem; }
@media (max-width: 640px) { #brand { flex-direction: column; gap: 0; } }
.run-head { display: flex; flex-wrap: wrap; gap: .35rem; align-items: baseline; }
.run-state { margin-left: auto; font-weight: 600; color: var(--primary-700); }
.dark .run-state { color: var(--primary-400); }
.run-failed .run-state, .run-interrupted .run-state { color: #b91c1c; }
.dark .run-failed .run-state, .dark .run-interrupted .run-state { color: #fca5a5; }
.run progress {
  appearance: none; width: 100%; height: .6rem; margin: .6rem 0 .3rem; border: 0;
  border-radius: .3rem; overflow: hidden; background: var(--border-color-primary);
}
.run progress::-webkit-progress-bar { background: var(--border-color-primary); }
.run progress::-webkit-progress-value { background: #0f766e; }
.run progress::-moz-progress-bar { background: #0f766e; }
.dark .run progress::-webkit-progress-value { background: #14b8a6; }
.dark .run progress::-moz-progress-bar { background: #14b8a6; }
.run-facts { font-variant-numeric: tabular-nums; }
.run p { margin: .4rem 0 0; white-space: pre-line; overflow-wrap: anywhere; }
#train-advanced .label-wrap span { text-align: left; }
#train-queue .wrap { flex-direction: column; align-items: stretch; }
#train-queue label { overflow-wrap: anywhere; }
.run-empty p { margin: .25rem 0 0; }
.loss svg { width: 100%; height: auto; }
.loss text { font-size: 11px; fill: currentColor; opacity: .75; }
.loss polyline { fill: none; stroke: #0f766e; }
.dark .loss polyline { stroke: #2dd4bf; }
@media (max-width: 640px) { .loss text { font-size: 18px; } }
.loss .raw { opacity: .35; } .loss .smooth { stroke-width: 2.2; }
.loss .grid { stroke: currentColor; opacity: .15; }
.loss, .sheet { margin: 0; }
.loss figcaption, .sheet figcaption { font-size: .85rem; opacity: .8; overflow-wrap: anywhere; }
.sheet img { width: 100%; border-radius: 6px; }
.forecast p { margin: .25rem 0 0; } .forecast summary { cursor: pointer; }
.forecast pre { font-size: .8rem; overflow-x: auto; margin: .3rem 0; }
.problem { white-space: pre-line; overflow-wrap: anywhere; color: #b91c1c; }
.dark .problem { color: #fca5a5; }
#create-results .grid-wrap, #create-gallery .grid-wrap { max-height: none; padding-top: 2.2rem; }
#create-gallery .caption-label, #create-results .caption-label { display: none; }
#create-gallery .thumbnail-item.selected { border-color: var(--border-color-primary); }
#create-results .thumbnail-item { aspect-ratio: auto; }
#create-preview img { width: 100%; max-height: 20rem; object-fit: contain; border-radius: 6px; }
.create-note p { margin: 0 0 .25rem; overflow-wrap: anywhere; }
"""

HEADER = (
    '<header id="brand"><h1>NoRA Diffusion</h1>'
    "<p>Teach a diffusion model your subject from a handful of photos.</p></header>"
)
