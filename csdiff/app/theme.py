"""How the page looks: system fonts, one accent, nothing fetched from elsewhere."""

from __future__ import annotations

import gradio as gr


def theme() -> gr.themes.Base:
    """A quiet theme."""
    return gr.themes.Base(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        body_background_fill="*neutral_50",
        block_label_background_fill="transparent",
        block_label_border_width="0px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .examples, .gradio-container .gallery { background: none; }
#head h1 { font-size: 1.5rem; margin: 0.2rem 0 0; letter-spacing: -0.01em; }
#head p { margin: 0.1rem 0 0; color: var(--body-text-color-subdued); }
.status p { margin: 0 0 0.35rem; font-size: 0.9rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.status progress { display: block; width: 100%; height: 4px; accent-color: var(--primary-600); }
.status p.error { color: #b42318; font-weight: 600; }
.status p.note { color: #8a5a00; }
.dark .status p.error { color: #ff9b8f; }
.dark .status p.note { color: #f0b95c; }
/* Plots are drawn for a light ground; turned round, with their hues kept, they suit a dark one. */
.dark .plot img { filter: invert(1) hue-rotate(180deg); }
#metrics table { width: 100%; }
#metrics td, #metrics th { border-color: var(--border-color-primary); overflow-wrap: normal; word-break: normal; }
/* One column on a phone: images follow the button, settings come last. */
@media (max-width: 720px) {
  .workplace { flex-direction: column; flex-wrap: nowrap; }
  .workplace > .asked { display: contents; }
  .workplace > * , .workplace > .asked > * { flex: none !important; width: 100%; }
  .workplace > .answered { order: 1; }
  .workplace > .asked > .settings { order: 2; }
  /* Letters that can be read, and a plot to push aside. */
  .plot { overflow-x: auto !important; }
  .plot .layout { align-items: flex-start; }
  .plot img { width: 560px; max-width: none; }
  #metrics td, #metrics th { font-size: 0.7rem; padding: 0.25rem; }
}
/* All images at once, as high as they are: a second row would hide behind a scroll bar. */
.pictures .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
.pictures .grid-container { grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto; }
.pictures .grid-container:has(> :only-child) { grid-template-columns: minmax(0, 480px); justify-content: center; }
/* Captions below images. */
.pictures .thumbnail-lg, .pictures .thumbnail-lg > img { aspect-ratio: auto; height: auto; }
.pictures .caption-label { position: static; max-width: none; border: 0; background: none; text-align: center; }
#strip .caption-label { white-space: normal; }
.pictures .caption { max-width: 100%; }
.pictures .gallery-container:has(.preview) { min-height: 420px; }
.pictures .preview { background: var(--block-background-fill); }
.pictures .empty svg { display: none; }
.pictures .empty::after { content: "Your images appear here"; color: var(--body-text-color-subdued); }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(90px, 1fr)); }
"""
