"""Drawing for the page: what is asked for, checked, and drawn image by image with reports on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from csdiff.app.models import Models
from csdiff.app.work import Progress, Report
from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import well_formed
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard
from csdiff.pipelines.decoding import DrawingOptions
from csdiff.pipelines.generate import (
    check_config,
    picture_name,
    read_settings,
    redraw_command,
    sampling,
    write_picture,
)

MOST_STEPS = 200
LONGEST_PROMPT = 2000
LARGEST_SIDE = 1024
WAY = (0.0, 0.25, 0.5, 0.75, 1.0)
_OBJECTIVES = {"cs_aligner": "CS-Aligner", "ridge": "Ridge"}


@dataclass(frozen=True)
class Settings:
    """What one press of the button asks for; None leaves steps and guidance to the decoder."""

    prompt: str = ""
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
            CSDiffError: a number or a text that makes no image.
        """
        if not self.prompt.strip():
            raise CSDiffError("Type what to draw first: the prompt is empty.")
        if not 1 <= self.count <= models.config.max_images:
            raise CSDiffError(f"Expected 1 to {models.config.max_images} images, found {self.count}.")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise CSDiffError(f"Expected 1 to {MOST_STEPS} steps, found {self.steps}.")
        if max(len(self.prompt), len(self.negative)) > LONGEST_PROMPT:
            raise CSDiffError(f"Expected a text of at most {LONGEST_PROMPT} characters, found a longer one.")
        config = GenerateConfig(
            prompt=[well_formed(self.prompt.strip())],
            negative_prompt=well_formed(self.negative.strip()) or None,
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
class Started:
    """The settings are good and the drawing begins; `command` does the same on the command line."""

    command: str


@dataclass(frozen=True)
class Drawn:
    """A finished image: where it is, what stands under it, and to which part of the page it belongs."""

    path: str
    caption: str
    place: str = "images"


@dataclass(frozen=True)
class Missing:
    """An image that cannot be drawn, and why."""

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
    return _OBJECTIVES.get(objective, objective or card.kind)


def create(models: Models, settings: Settings, compare: bool, report: Report) -> None:
    """Draws the images of a prompt; then, to compare, its first seed without the adapter and with a ridge map."""
    drawing = _Drawing(models, settings, report, settings.count + (2 if compare else 0))
    prompt, config = settings.prompt.strip(), drawing.config
    seeds = range(config.seed, config.seed + config.num_images)
    report(Started(redraw_command(config, [prompt], [(prompt, seed) for seed in seeds])))
    with drawing:
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            embeds = drawing.embed(prompt, generator)
            image = drawing.draw(prompt, embeds, generator)
            path = drawing.write(image, prompt, seed, redraw_command(config, [prompt], [(prompt, seed)]))
            report(Drawn(path, f"{prompt}, seed {seed}"))
            if compare and seed == config.seed:
                report(Drawn(path, adapter_name(drawing.card), "adapter"))
        if compare:
            for place, embed in (("raw", drawing.raw_text), ("ridge", drawing.ridge)):
                drawing.other_map(place, embed, prompt)


def blend(
    models: Models, settings: Settings, second: str | Image.Image, weights: Sequence[float], report: Report
) -> None:
    """Draws `(1 - w) a + w b` of raw image embeddings for every weight `w`, all from one seed.

    Args:
        models: where the models come from.
        settings: with `prompt` the first of the two.
        second: a prompt, or an image.
        weights: the share of the second, from 0 to 1.
        report: is told of progress and images.

    Raises:
        CSDiffError: an empty prompt.
    """
    if isinstance(second, str):
        if not settings.prompt.strip() or not second.strip():
            raise CSDiffError("A blend needs two prompts, or a prompt and an image: one of them is empty.")
        replace(settings, prompt=second).options(models)
    drawing = _Drawing(models, settings, report, len(weights))
    first, seed = settings.prompt.strip(), drawing.config.seed
    with drawing:
        start = drawing.embed(first, torch.Generator("cpu").manual_seed(seed))
        if isinstance(second, str):
            end = drawing.embed(second.strip(), torch.Generator("cpu").manual_seed(seed))
        else:
            end = models.image_embeds(drawing.embedder, second)
        for weight in weights:
            # some decoders read the prompt beside the embedding: the nearer one
            nearer = first if weight <= 0.5 else second.strip() if isinstance(second, str) else ""
            generator = torch.Generator("cpu").manual_seed(seed)
            image = drawing.draw(nearer, torch.lerp(start, end, weight), generator)
            other = second if isinstance(second, str) else "an image"
            path = drawing.write(image, first, seed, None, {"blend": {"second": other, "share": weight}})
            report(Drawn(path, f"{round(100 * (1 - weight))} : {round(100 * weight)}"))


class _Drawing:
    """One press of the button: its models, its settings, its progress. Entering it waits for the models."""

    def __init__(self, models: Models, settings: Settings, report: Report, total: int):
        self.models, self.settings, self.report, self.total = models, settings, report, total
        self.config = settings.options(models)
        self.card, self.source = models.find(settings.adapter, settings.decoder)
        self.steps, self.guidance = sampling(self.config, self.source)
        self.drawn = 0

    def __enter__(self) -> _Drawing:
        self._turn = self.models.line.turn(self.report, self.steps * self.total)
        self._left = self._turn.__enter__()
        try:
            self.report(Progress("Loading the models"))
            self.embedder = self.models.embedder(self.card, self.source)
            self.decoder = self.models.decoder(self.source)
        except BaseException:
            self._turn.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._turn.__exit__(None, None, None)

    def embed(self, prompt: str, generator: torch.Generator | None = None) -> Tensor:
        """A prompt through the adapter; the page is told when the text encoder does not read all of it."""
        encoder = self.embedder.encoder
        (count,) = encoder.caption_tokenizer.lengths([prompt])
        if count > encoder.max_length:
            self.report(Note(f"The prompt has {count} tokens; the text encoder reads the first {encoder.max_length}."))
        return self.embedder.embed([prompt], [generator] if self.embedder.samples else None)

    def draw(
        self, prompt: str, embeds: Tensor, generator: torch.Generator, negative: Tensor | None = None
    ) -> Image.Image:
        """One image, with a report at every step."""
        if negative is None and self.guidance > 1:
            negative = self.embedder.negative(self.config.negative_prompt)
        options = DrawingOptions(self.steps, self.guidance, self.config.negative_prompt)
        image = self.decoder.draw([prompt], embeds, negative, [generator], options, on_step=self._stepped)[0]
        self.drawn += 1
        return image

    def other_map(self, place: str, embed: Callable[[str], Tensor], prompt: str) -> None:
        """The first seed's image from another map than the adapter, or why there is none."""
        text = self.config.negative_prompt
        try:
            embeds = embed(prompt)
            # without a negative of its own every map shares the decoder's default
            negative = embed(text) if text and self.guidance > 1 else None
        except CSDiffError as error:
            self.drawn += 1
            self.report(Missing(str(error), place))
            return
        image = self.draw(prompt, embeds, torch.Generator("cpu").manual_seed(self.config.seed), negative)
        self.report(Drawn(self.write(image, prompt, self.config.seed, None, {"map": place}), place, place))

    def raw_text(self, prompt: str) -> Tensor:
        """The text embedding as it is; CSDiffError where the decoder takes another width."""
        embeds = self._text(prompt)
        if embeds.shape[1] != self.source.embedding_dim:
            raise CSDiffError(
                f"Not possible: the text embedding has {embeds.shape[1]} dimensions, the decoder takes "
                f"{self.source.embedding_dim}."
            )
        return embeds

    @torch.no_grad()
    def ridge(self, prompt: str) -> Tensor:
        """The text embedding through a ridge map."""
        ridge = self.models.ridge(self.card, self.source)
        return ridge.embed(self._text(prompt).float()).to(self.embedder.dtype)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        # an adapter inside the text encoder has changed that one
        inside = self.card is not None and self.card.kind == "LoRAAdapter"
        encoder = (self.models.embedder(None, self.source) if inside else self.embedder).encoder
        return encoder.encode([prompt]).embeds

    def _stepped(self, step: int, total: int, preview: Callable[[], Image.Image | None]) -> None:
        done = self.drawn * self.steps + step
        number = f"Image {self.drawn + 1} of {self.total}, step" if self.total > 1 else "Step"
        text = f"{number} {step} of {total}{self._left(done)}"
        seen = preview() if step % max(2, total // 5) == 0 and step < total else None
        self.report(Progress(text, done, self.total * self.steps, seen))

    def write(
        self, image: Image.Image, prompt: str, seed: int, command: str | None, more: Mapping[str, Any] | None = None
    ) -> str:
        """Writes a PNG that holds its settings, under a name that says what it is; returns the path."""
        record = asdict(replace(self.settings, prompt=prompt, seed=seed, count=1))
        record |= {"steps": self.steps, "guidance": self.guidance, **(more or {})}
        record |= {"command": command} if command else {}
        folder = Path(tempfile.mkdtemp(dir=self.models.folder))
        return str(write_picture(folder, picture_name(prompt, seed), image, record))


def settings_of(path: str) -> Settings:
    """The settings with which a PNG was drawn, by the page or by `csdiff generate`.

    Raises:
        CSDiffError: no PNG, or one that holds none.
    """
    record = read_settings(path)
    record.setdefault("negative", record.get("negative_prompt"))
    return from_mapping(record)


def from_mapping(record: Mapping[str, Any]) -> Settings:
    """Settings from a PNG, a link or the browser's memory, all of which may hold anything: what does not fit is left.

    Adapters and decoders that `csdiff generate` records by their folders are taken by these.
    """

    def value(name: str, kind: type, default: Any) -> Any:
        found = record.get(name)
        if isinstance(found, Mapping):
            found = found.get("folder") or found.get("source")
        try:
            return default if found is None or isinstance(found, (list, dict)) else kind(found)
        except (TypeError, ValueError, OverflowError):
            return default

    given = Settings(
        prompt=value("prompt", str, "")[:LONGEST_PROMPT],
        negative=value("negative", str, "")[:LONGEST_PROMPT],
        seed=max(0, value("seed", int, 0)),
        count=max(1, value("count", int, 1)),
        steps=value("steps", int, None),
        guidance=value("guidance", float, None),
        adapter=value("adapter", str, None),
        decoder=value("decoder", str, None),
    )
    return replace(given, adapter=given.adapter or None, decoder=given.decoder or None)


def read_upload(path: str | None) -> Image.Image:
    """An uploaded image, upright, in RGB, at most 1024 pixels a side.

    Raises:
        CSDiffError: nothing uploaded, no image, or one whose decoding would take too much memory.
    """
    if path is None:
        raise CSDiffError("Drop an image into the field first, or use a second prompt.")
    try:
        image = decode_image(Path(path))
    except (UnreadableImage, OSError) as error:
        raise CSDiffError(
            f"{Path(path).name} cannot be read as an image ({error}); use a whole PNG, JPEG, WebP or GIF."
        ) from error
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image
