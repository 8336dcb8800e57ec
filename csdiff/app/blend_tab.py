"""The tab *Blend*: between two prompts, or between a prompt and a picture."""

from __future__ import annotations

import gradio as gr

from csdiff.app.blending import WEIGHTS, blend
from csdiff.app.models import Models
from csdiff.app.pictures import read_upload
from csdiff.app.presses import on_press
from csdiff.app.settings import Fields, ModelChoice, sampling_fields, settings
from csdiff.app.tasks import updates
from csdiff.app.theme import status
from csdiff.errors import CSDiffError


def blend_tab(models: Models, choice: ModelChoice) -> Fields:
    """Builds the tab; returns its fields that follow the decoder."""
    with gr.Row(equal_height=False, elem_classes="workplace"):
        with gr.Column(scale=2, min_width=320, elem_classes="asked"):
            first = gr.Textbox(label="First prompt", value="a red apple, 3d style", max_length=2000, elem_id="first")
            second = gr.Textbox(label="Second prompt", value="a yellow duck", max_length=2000, elem_id="second")
            picture = gr.Image(
                label="... or a picture in its place",
                sources=["upload", "clipboard"],
                height=180,
                elem_id="second-picture",
                buttons=[],
            )
            # the uploaded file as it is: it is looked at before anything decodes it
            picture.preprocess = lambda payload: None if payload is None else payload.path
            share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second")
            whole = gr.Checkbox(
                False, label="The whole way: five pictures from the first to the second", container=False
            )
            with gr.Row():
                draw = gr.Button("Blend", variant="primary", elem_id="blend", min_width=120)
                stop = gr.Button("Stop", elem_id="stop-blend", min_width=80)
            line = gr.HTML(status(), elem_id="blend-status", padding=False)
            with gr.Column(elem_classes="settings"):
                negative = gr.Textbox(
                    label="Negative prompt", placeholder="what the pictures should not show", max_length=2000
                )
                fields = sampling_fields(models, "blend-")
        with gr.Column(scale=3, min_width=320, elem_classes="answered"):
            gallery = gr.Gallery(
                label="Pictures",
                show_label=False,
                elem_id="blended",
                columns=3,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
            )
            gr.Markdown(
                "A blend is `(1 - s) a + s b` of two image embeddings, all pictures from one seed. Prompts become "
                "image embeddings through the adapter, pictures through the image encoder."
            )

    def run(stopped, first, second, picture, share, whole, negative, adapter, decoder, *numbers):
        try:
            asked = settings(first, negative, 1, *numbers, adapter, decoder)
            other = read_upload(picture) if picture else second or ""
        except CSDiffError as error:
            yield {line: status(error=str(error))}
            return
        weights = WEIGHTS if whole else (float(share),)
        drawn: list[tuple[str, str]] = []

        def show(message):
            drawn.append((message.path, message.caption))
            return {gallery: list(drawn), fields.seed: asked.seed}

        yield {gallery: []}
        yield from updates(
            lambda report: blend(models, asked, other, weights, report),
            line,
            show,
            lambda: f"Done, seed {asked.seed}.",
            stopped,
        )

    def look_at(path):
        """Says at once what is wrong with an upload, and takes it out of the field."""
        if path is None:
            return gr.skip(), status()
        try:
            read_upload(path)
        except CSDiffError as error:
            return None, status(error=str(error))
        return gr.skip(), status(done="The picture takes the place of the second prompt.")

    # not queued behind drawings
    picture.upload(look_at, picture, [picture, line], queue=False, api_visibility="private")
    inputs = [first, second, picture, share, whole, negative, choice.adapter, choice.decoder, *fields.all()]
    on_press([draw.click], stop, run, inputs, [line, gallery, fields.seed], line=line, queue="models")
    return fields
