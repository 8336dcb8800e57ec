"""Fields that several tabs have: seed, steps, guidance, negative, and the choice of models."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from csdiff.app.drawing import MOST_STEPS, Settings
from csdiff.app.models import RAW_TEXT, SHIPPED, Models
from csdiff.app.theme import status
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import PRESETS, resolve_decoder
from csdiff.pipelines.generate import sampling

LARGEST_SEED = 2**31 - 1
MOST_GUIDANCE = 30.0


@dataclass
class ModelChoice:
    """The adapter and the decoder that the whole page uses."""

    adapter: gr.Dropdown
    decoder: gr.Dropdown
    line: gr.HTML


@dataclass
class Fields:
    """Numbers of one tab."""

    seed: gr.Number
    random: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider

    def all(self) -> list:
        return [self.seed, self.random, self.steps, self.guidance]


def model_choice(models: Models) -> ModelChoice:
    """Builds the two choices; both take a folder or a hub repository typed in."""
    start = models.config.adapter or SHIPPED
    runs = [str(path.parent) for path in sorted(Path("runs").glob("*/csdiff.json"))][:50]
    adapters = list(dict.fromkeys([start, SHIPPED, RAW_TEXT, *runs]))
    labels = {SHIPPED: "shipped with csdiff", RAW_TEXT: "none: the raw text embedding"}
    with gr.Accordion("Models", open=False), gr.Row():
        adapter = gr.Dropdown(
            [(labels.get(name, name), name) for name in adapters],
            value=start,
            label="Adapter",
            info="Choose one, or type a folder or a hub repository",
            allow_custom_value=True,
        )
        decoder = gr.Dropdown(
            list(dict.fromkeys([models.config.decoder, *PRESETS])),
            value=models.config.decoder,
            label="Decoder",
            info="A preset, a folder saved by diffusers, or a hub repository",
            allow_custom_value=True,
        )
    return ModelChoice(adapter, decoder, gr.HTML("", elem_id="models-status", visible=False))


def sampling_fields(models: Models, name: str = "") -> Fields:
    """Builds seed, steps and guidance with what the page's decoder is made for."""
    steps, guidance = defaults(models, None)
    with gr.Row():
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120, elem_id=f"{name}seed"
        )
        random = gr.Checkbox(False, label="New each time", min_width=160)
    with gr.Row():
        steps = gr.Slider(1, MOST_STEPS, value=steps, step=1, label="Steps", min_width=150, elem_id=f"{name}steps")
        guidance = gr.Slider(1, MOST_GUIDANCE, value=guidance, step=0.5, label="Guidance", min_width=150)
    return Fields(seed, random, steps, guidance)


def defaults(models: Models, decoder: str | None) -> tuple[int, float]:
    """Steps and guidance that a decoder is made for, as far as the sliders go."""
    steps, guidance = sampling(GenerateConfig(), resolve_decoder(models.decoder_option(decoder)))
    return min(max(steps, 1), MOST_STEPS), min(max(guidance, 1.0), MOST_GUIDANCE)


def follow_decoder(models: Models, choice: ModelChoice, fields: list[Fields]) -> None:
    """Checks what was chosen, and sets steps and guidance to what the decoder is made for."""
    targets = [component for field in fields for component in (field.steps, field.guidance)]

    def check(adapter: str, decoder: str):
        try:
            models.find(adapter, decoder)
            numbers = defaults(models, decoder)
        except (CSDiffError, OSError) as error:
            return [gr.HTML(status(error=str(error)), visible=True), *([gr.skip()] * len(targets))]
        steps, guidance = numbers
        return [
            gr.HTML("", visible=False),
            *[gr.Slider(value=value) for _ in fields for value in (steps, guidance)],
        ]

    for changed in (choice.adapter, choice.decoder):
        changed.change(
            check,
            [choice.adapter, choice.decoder],
            [choice.line, *targets],
            show_progress="hidden",
            api_visibility="private",
        )


def settings(prompt, negative, count, seed, random, steps, guidance, adapter, decoder) -> Settings:
    """The values of the fields; a field that was emptied means its default.

    Raises:
        CSDiffError: a number that is none.
    """
    try:
        return Settings(
            prompt=prompt or "",
            negative=negative or "",
            seed=secrets.randbelow(LARGEST_SEED) if random else int(seed or 0),
            count=int(count),
            steps=None if steps is None else int(steps),
            guidance=None if guidance is None else float(guidance),
            adapter=adapter,
            decoder=decoder,
        )
    except (TypeError, ValueError) as error:
        raise CSDiffError(f"Expected whole numbers for seed, steps and pictures ({error}).") from error
