"""The page: three tabs over one choice of models."""

from __future__ import annotations

import gradio as gr

from csdiff.app.blend_tab import blend_tab
from csdiff.app.create_tab import create_tab
from csdiff.app.inspect_tab import inspect_tab
from csdiff.app.inspection import Inspector
from csdiff.app.models import Models
from csdiff.app.settings import follow_decoder, model_choice

# Uploads and pictures are kept so long, in seconds.
KEPT = 6 * 3600


def build_page(models: Models, inspector: Inspector) -> gr.Blocks:
    """The Gradio blocks; everything that someone does stays in their own session."""
    with gr.Blocks(title="csdiff", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.HTML(
            "<h1>csdiff</h1><p>A prompt becomes an image embedding in one step; an unCLIP decoder draws it.</p>",
            elem_id="head",
        )
        choice = model_choice(models)
        with gr.Tabs():
            with gr.Tab("Create"):
                fields = [create_tab(models, choice)]
            with gr.Tab("Blend"):
                fields.append(blend_tab(models, choice))
            with gr.Tab("Look inside"):
                inspect_tab(inspector)
        follow_decoder(models, choice, fields)
    return page
