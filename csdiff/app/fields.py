"""Parts of the page that several tabs use: the choice of models, the settings of a drawing, a gallery."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from csdiff.app.drawing import LARGEST_SEED
from csdiff.app.models import RAW_TEXT, SHIPPED, Models
from csdiff.app.press import ASIDE, status
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import PRESETS, find_models, resolve_decoder
from csdiff.pipelines.generate import sampling

MOST = {"seed": LARGEST_SEED, "steps": 200, "guidance": 30.0}
LONGEST_PROMPT = 2000


class ModelChoice:
    """The adapter and the decoder that the whole page uses; both take a folder or a hub repository typed in."""

    def __init__(self, models: Models):
        start = models.config.adapter or SHIPPED
        runs = [str(path.parent) for path in sorted(Path("runs").glob("*/csdiff.json"))][:50]
        labels = {SHIPPED: "shipped with csdiff", RAW_TEXT: "none: the raw text embedding"}
        adapters = [(labels.get(name, name), name) for name in dict.fromkeys([start, SHIPPED, RAW_TEXT, *runs])]
        decoders = list(dict.fromkeys([models.config.decoder, *PRESETS]))
        typed = {"allow_custom_value": True}
        with gr.Accordion("Models", open=False), gr.Row():
            hint = "Choose one, or type a folder or a hub repository"
            self.adapter = gr.Dropdown(adapters, value=start, label="Adapter", info=hint, elem_id="adapter", **typed)
            hint = "A preset, a folder saved by diffusers, or a hub repository"
            self.decoder = gr.Dropdown(decoders, value=decoders[0], label="Decoder", info=hint, **typed)
        self.line = gr.HTML("", elem_id="models-status", visible=False)

    def follow(self, models: Models, tabs: list[Fields]) -> None:
        """Checks what was chosen, and sets steps and guidance to what the decoder is made for."""

        def check(adapter: str, decoder: str):
            try:
                find_models(models.options(adapter, decoder))
                numbers = sampling_of(models, decoder)
            except (CSDiffError, OSError) as error:
                return [gr.HTML(status(str(error), error=True), visible=True), *[gr.skip()] * 2 * len(tabs)]
            return [gr.HTML("", visible=False), *numbers * len(tabs)]

        chosen, targets = [self.adapter, self.decoder], [part for tab in tabs for part in (tab.steps, tab.guidance)]
        gr.on([part.input for part in chosen], check, chosen, [self.line, *targets], **ASIDE | {"queue": True})


def sampling_of(models: Models, decoder: str | None) -> tuple[int, float]:
    """Steps and guidance that a decoder is made for, as far as the sliders go."""
    options = models.options(decoder=decoder)
    options = sampling(options, resolve_decoder(options.decoder))
    return min(options.steps, MOST["steps"]), min(max(options.guidance, 1.0), MOST["guidance"])


class Fields:
    """Negative prompt, seed, steps and guidance of one tab."""

    def __init__(self, models: Models, name: str = ""):
        steps, guidance = sampling_of(models, None)
        hint = "what the images should not show"
        self.negative = gr.Textbox(label="Negative prompt", placeholder=hint, max_length=LONGEST_PROMPT)
        with gr.Row():
            whole = {"precision": 0, "minimum": 0, "maximum": LARGEST_SEED}
            self.seed = gr.Number(0, label="Seed", min_width=120, elem_id=f"{name}seed", **whole)
            self.random = gr.Checkbox(False, label="New each time", min_width=160)
        with gr.Row():
            place = {"min_width": 150, "elem_id": f"{name}steps"}
            self.steps = gr.Slider(1, MOST["steps"], value=steps, step=1, label="Steps", **place)
            self.guidance = gr.Slider(1, MOST["guidance"], value=guidance, step=0.5, label="Guidance", min_width=150)

    def all(self) -> list:
        return [self.negative, self.seed, self.random, self.steps, self.guidance]


def gallery(name: str, columns: int) -> gr.Gallery:
    """Images at their own size, to download."""
    return gr.Gallery(
        show_label=False, elem_id=name, columns=columns, fit_columns=False, height="auto", object_fit="contain",
        format="png", buttons=["download", "fullscreen"], interactive=False,
    )  # fmt: skip
