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
.status { min-height: 1.9rem; }
.status p { margin: 0 0 0.35rem; font-size: 0.9rem; color: var(--body-text-color-subdued); }
.status progress { display: block; width: 100%; height: 4px; accent-color: var(--primary-600); }
.status p.error { color: #b42318; font-weight: 600; }
.status p.note { color: #8a5a00; }
/* One column on a phone: images follow the button, settings come last. */
@media (max-width: 720px) {
  .workplace { flex-direction: column; flex-wrap: nowrap; }
  .workplace > .asked { display: contents; }
  .workplace > * , .workplace > .asked > * { flex: none !important; width: 100%; }
  .workplace > .answered { order: 1; }
  .workplace > .asked > .settings { order: 2; }
}
/* All images at once: a second row would hide behind a scroll bar. */
#images .grid-wrap, #strip .grid-wrap, #blended .grid-wrap, #history .grid-wrap { max-height: none; }
#strip .grid-wrap, #history .grid-wrap { min-height: 0; }
#strip .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
"""
