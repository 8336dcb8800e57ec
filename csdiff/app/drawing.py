"""Drawing for the page: what is asked for, checked, and drawn picture by picture with reports on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from csdiff.app.models import Models
from csdiff.app.pictures import write_png
from csdiff.app.streaming import Report
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import DecoderSource
from csdiff.pipelines.decoding import DrawingOptions
from csdiff.pipelines.embedding import PromptEmbedder
from csdiff.pipelines.generate import check_config, read_prompts, redraw_command, sampling
from csdiff.pipelines.pairing import AdapterCard

MOST_STEPS = 200
LONGEST_PROMPT = 2000
OBJECTIVES = {"cs_aligner": "CS-Aligner", "ridge": "Ridge"}


@dataclass(frozen=True)
class Settings:
    """What one press of the button asks for; None leaves steps and guidance to the decoder."""

    prompt: str
    negative: str = ""
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    adapter: str | None = None
    decoder: str | None = None

    def options(self, models: Models) -> GenerateConfig:
        """The same as options of `csdiff generate`.

        Raises:
            CSDiffError: a number or a text that makes no picture.
        """
        most = models.config.max_images
        if not 1 <= self.count <= most:
            raise CSDiffError(f"Expected 1 to {most} pictures, found {self.count}.")
        if self.steps is not None and self.steps > MOST_STEPS:
            raise CSDiffError(f"Expected at most {MOST_STEPS} steps, found {self.steps}.")
        if max(len(self.prompt), len(self.negative)) > LONGEST_PROMPT:
            raise CSDiffError(f"Expected a text of at most {LONGEST_PROMPT} characters, found a longer one.")
        config = GenerateConfig(
            prompt=[self.prompt.strip()],
            negative_prompt=self.negative.strip() or None,
            seed=self.seed,
            num_images=self.count,
            steps=self.steps,
            guidance=self.guidance,
            adapter=models.adapter_option(self.adapter),
            decoder=models.decoder_option(self.decoder),
            device=models.config.device,
            dtype=models.config.dtype,
        )
        return check_config(config)


@dataclass(frozen=True)
class Progress:
    """How far the work is: done of total steps, and a few words."""

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Started:
    """The settings are good and the drawing begins; `command` does the same on the command line."""

    command: str


@dataclass(frozen=True)
class Drawn:
    """A finished picture: where it is, what stands under it, and to which part of the page it belongs."""

    path: str
    caption: str
    place: str = "pictures"


@dataclass(frozen=True)
class Missing:
    """A picture that cannot be drawn, and why."""

    reason: str
    place: str


@dataclass(frozen=True)
class Note:
    """Something to know about the result."""

    text: str


def adapter_name(card: AdapterCard | None) -> str:
    """What an adapter is called beside the baselines: by its objective."""
    if card is None:
        return "Raw text"
    objective = (card.metadata.get("objective") or {}).get("name")
    return OBJECTIVES.get(objective, objective or card.kind)


def create(models: Models, settings: Settings, compare: bool, report: Report) -> None:
    """Draws the pictures of a prompt, then the same prompt and seed without the adapter and with a ridge map."""
    config = settings.options(models)
    prompts = read_prompts(config)
    card, source = models.find(settings.adapter, settings.decoder)
    seeds = range(config.seed, config.seed + config.num_images)
    report(Started(redraw_command(config, prompts, [(prompts[0], seed) for seed in seeds])))
    report(Progress("Loading the models"))
    with models.turn(lambda text: report(Progress(text))):
        session = Session(models, card, source, config, report)
        session.total = config.num_images + (2 if compare else 0)
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            embeds = session.embed(prompts[0], [generator])
            image = session.draw(prompts[0], embeds, session.negative(), generator)
            command = redraw_command(config, prompts, [(prompts[0], seed)])
            record = {"prompt": prompts[0], "seed": seed, "command": command}
            path = write_png(models.folder, image, prompts[0], seed, record)
            report(Drawn(path, f"seed {seed}"))
            if compare and seed == config.seed:
                report(Drawn(path, adapter_name(card), "adapter"))
        if compare:
            session.compare(prompts[0])


class Session:
    """One press of the button: its models, its settings, its progress. Nothing of it outlives the drawing."""

    def __init__(
        self, models: Models, card: AdapterCard | None, source: DecoderSource, config: GenerateConfig, report: Report
    ):
        self.models, self.card, self.source, self.config, self.report = models, card, source, config, report
        self.steps, self.guidance = sampling(config, source)
        self.embedder: PromptEmbedder = models.embedder(card, source)
        self.decoder = models.decoder(source)
        self.drawn, self.total = 0, 1

    def embed(self, prompt: str, generators: list[torch.Generator] | None = None) -> Tensor:
        """A prompt through the adapter; the page is told when the text encoder does not read all of it."""
        encoder = self.embedder.encoder
        count = len(encoder.tokenizer([prompt], verbose=False).input_ids[0])
        if count > encoder.max_length:
            self.report(Note(f"The prompt has {count} tokens; the text encoder reads the first {encoder.max_length}."))
        return self.embedder.embed([prompt], generators if self.embedder.samples else None)

    def negative(self) -> Tensor | None:
        return self.embedder.negative(self.config.negative_prompt) if self.guidance > 1 else None

    def draw(self, prompt: str, embeds: Tensor, negative: Tensor | None, generator: torch.Generator) -> Image.Image:
        """One picture, with a report at every step."""
        options = DrawingOptions(self.steps, self.guidance, self.config.negative_prompt)
        with _each_step(self.decoder.pipe, self._stepped):
            image = self.decoder.draw([prompt], embeds, negative, [generator], options)[0]
        self.drawn += 1
        return image

    def compare(self, prompt: str) -> None:
        """The first seed's picture from the raw text embedding and from a ridge map."""
        for place, embed in (("raw", self._raw), ("ridge", self._ridge)):
            try:
                embeds = embed(prompt)
                # without a negative of its own every map shares the decoder's default
                text = self.config.negative_prompt
                negative = (embed(text) if text else self.negative()) if self.guidance > 1 else None
            except CSDiffError as error:
                self.report(Missing(str(error), place))
                self.drawn += 1
                continue
            generator = torch.Generator("cpu").manual_seed(self.config.seed)
            image = self.draw(prompt, embeds, negative, generator)
            record = {"prompt": prompt, "seed": self.config.seed, "map": place}
            path = write_png(self.models.folder, image, prompt, self.config.seed, record, f"-{place}")
            self.report(Drawn(path, place, place))

    def _text(self, prompt: str) -> Tensor:
        # an adapter inside the text encoder has changed that one
        inside = self.card is not None and self.card.kind == "LoRAAdapter"
        encoder = (self.models.embedder(None, self.source) if inside else self.embedder).encoder
        with torch.no_grad():
            return encoder.encode([prompt]).embeds

    def _raw(self, prompt: str) -> Tensor:
        embeds = self._text(prompt)
        if embeds.shape[1] != self.source.embedding_dim:
            raise CSDiffError(
                f"Not possible: the text embedding has {embeds.shape[1]} dimensions, the decoder takes "
                f"{self.source.embedding_dim}."
            )
        return embeds

    def _ridge(self, prompt: str) -> Tensor:
        ridge = self.models.ridge(self.card, self.source)
        with torch.no_grad():
            return ridge.embed(self._text(prompt).float()).to(self.models.dtype)

    def _stepped(self, step: int) -> None:
        number = f"picture {self.drawn + 1} of {self.total}, " if self.total > 1 else ""
        done = self.drawn * self.steps + min(step, self.steps)
        self.report(Progress(f"{number}step {step} of {self.steps}".capitalize(), done, self.total * self.steps))


@contextmanager
def _each_step(pipe, stepped) -> Iterator[None]:
    """Calls `stepped(number)` before each denoising step; what it raises ends the drawing.

    A hook on the network that denoises: some pipelines have no callback.
    """
    network = getattr(pipe, "unet", None) or pipe.decoder
    count = 0

    def before(module, arguments):
        nonlocal count
        count += 1
        stepped(count)

    hook = network.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
