"""The tab *Create*: a prompt to pictures, beside what the same prompt gives without the adapter."""

from __future__ import annotations

import gradio as gr

from csdiff.app.drawing import Missing, Started, create
from csdiff.app.models import Models
from csdiff.app.presses import on_press
from csdiff.app.settings import Fields, ModelChoice, sampling_fields, settings
from csdiff.app.tasks import updates
from csdiff.app.theme import status
from csdiff.errors import CSDiffError

# Of the sixteen of docs/pictures.md, four where raw text, ridge and adapter visibly differ.
EXAMPLES = (
    "a sunflower in a pot, 3d style",
    "a snowman with a hat, flat style",
    "one shiny purple heart, 3d style",
    "a sailing boat on the sea, flat style",
)
STRIP = {
    "raw": ("Raw text", "The text embedding as it is"),
    "ridge": ("Ridge", "A linear map fitted to the same pairs"),
    "adapter": ("Adapter", "The chosen adapter, in one step"),
}


def create_tab(models: Models, choice: ModelChoice) -> Fields:
    """Builds the tab; returns its fields that follow the decoder."""
    with gr.Row(equal_height=False, elem_classes="workplace"):
        with gr.Column(scale=2, min_width=320, elem_classes="asked"):
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="a red apple, 3d style",
                lines=2,
                max_length=2000,
                elem_id="prompt",
                autofocus=True,
            )
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="For example", api_visibility="private")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            line = gr.HTML(status(), elem_id="create-status", padding=False)
            with gr.Column(elem_classes="settings"):
                compare = gr.Checkbox(
                    True, label="Compare: the same without the adapter, and with a ridge map", container=False
                )
                negative = gr.Textbox(
                    label="Negative prompt", placeholder="what the pictures should not show", max_length=2000
                )
                count = gr.Slider(1, models.config.max_images, value=1, step=1, label="Pictures", elem_id="count")
                fields = sampling_fields(models)
        with gr.Column(scale=3, min_width=320, elem_classes="answered"):
            gallery = gr.Gallery(
                label="Pictures",
                show_label=False,
                elem_id="pictures",
                columns=2,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
            )
            strip, texts = {}, {}
            with gr.Row(elem_classes="strip", elem_id="strip"):
                for place, (name, text) in STRIP.items():
                    with gr.Column(min_width=96):
                        strip[place] = gr.Image(
                            label=name,
                            elem_id=f"strip-{place}",
                            interactive=False,
                            height=190,
                            format="png",
                            buttons=[],
                        )
                        texts[place] = gr.Markdown(text)
            command = gr.Textbox(
                label="The same on the command line",
                elem_id="command",
                interactive=False,
                lines=2,
                buttons=["copy"],
                visible=False,
            )

    def run(stopped, prompt, negative, count, compare, adapter, decoder, *numbers):
        try:
            asked = settings(prompt, negative, count, *numbers, adapter, decoder)
        except CSDiffError as error:
            yield {line: status(error=str(error))}
            return
        drawn: list[tuple[str, str]] = []

        def show(message):
            if isinstance(message, Started):
                blank = dict.fromkeys(strip.values())
                words = {texts[place]: text for place, (_, text) in STRIP.items()}
                again = gr.Textbox(message.command, visible=True)
                return {gallery: [], **blank, **words, command: again, fields.seed: asked.seed}
            if isinstance(message, Missing):
                return {texts[message.place]: message.reason}
            if message.place == "adapter":
                return {strip["adapter"]: gr.Image(message.path, label=message.caption)}
            if message.place in strip:
                return {strip[message.place]: message.path}
            drawn.append((message.path, message.caption))
            return {gallery: list(drawn)}

        def done() -> str:
            return f"Done: {len(drawn)} picture{'s' * (len(drawn) != 1)}."

        yield from updates(lambda report: create(models, asked, compare, report), line, show, done, stopped)

    inputs = [prompt, negative, count, compare, choice.adapter, choice.decoder, *fields.all()]
    outputs = [line, gallery, *strip.values(), *texts.values(), command, fields.seed]
    on_press([draw.click, prompt.submit], stop, run, inputs, outputs, line=line, queue="models")
    return fields
