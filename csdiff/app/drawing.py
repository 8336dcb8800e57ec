"""Drawing for the page: what is asked for, checked, and drawn image by image with reports on the way."""

from __future__ import annotations

import copy
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from csdiff.app.models import RAW_TEXT, SHIPPED, Models
from csdiff.app.press import UNFINISHED, Note, Progress, Report
from csdiff.data.images import UnreadableImage, decode_image
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, find_models
from csdiff.pipelines.embedding import noise
from csdiff.pipelines.generate import check_config, picture_name, redraw_command, write_picture

LARGEST_SEED = 2**31 - 1
LARGEST_SIDE = 1024
# What a PNG, a link and the browser's memory hold of the options, in the order of the fields.
KEPT = {
    "prompt": str, "num_images": int, "negative_prompt": str, "seed": int, "steps": int, "guidance": float,
    "adapter": str, "decoder": str,
}  # fmt: skip
OTHER_MAPS = {"raw": "Raw text", "ridge": "Ridge"}
_OBJECTIVES = {"cs_aligner": "CS-Aligner", "ridge": "Ridge"}


@dataclass(frozen=True)
class Drawn:
    """A finished image as a path, or one that is still being drawn, and what stands under it.

    `place` is "images", or of what is drawn to compare "adapter", "raw" or "ridge".
    """

    image: str | Image.Image
    caption: str
    place: str = "images"


def settings(models: Models, prompt, count, negative, seed, steps, guidance, adapter, decoder, random):
    """The values of the fields as options of `csdiff generate`; a field that was emptied means its default."""
    return models.options(
        adapter,
        decoder,
        prompt=[(prompt or "").strip()],
        negative_prompt=(negative or "").strip() or None,
        seed=secrets.randbelow(LARGEST_SEED) if random else int(seed or 0),
        num_images=int(count or 1),
        steps=int(steps) if steps else None,
        guidance=float(guidance) if guidance else None,
    )


def check(config: GenerateConfig) -> GenerateConfig:
    """The same options, checked as far as that goes without loading models.

    Raises:
        CSDiffError: an empty prompt, an option out of range or one that the decoder does not read, or models that are
            not there or do not fit.
    """
    if not config.prompt[0]:
        raise CSDiffError("Type what to draw first: the prompt is empty.")
    _, decoder = find_models(config)
    decoder.sampling(config)
    return check_config(config)


def to_record(config: GenerateConfig) -> dict[str, Any]:
    """What a PNG and a link hold."""
    record = {name: getattr(config, name) for name in KEPT}
    return record | {"prompt": config.prompt[0], "adapter": config.adapter or SHIPPED}


def from_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a PNG, a link or the browser's memory, all of which may hold anything: what does not fit is left.

    `csdiff generate` records of adapters and decoders more than their place, and of the shipped adapter none.
    """
    found: dict[str, Any] = {"prompt": "", "negative_prompt": "", "seed": 0, "num_images": 1}
    for name, kind in KEPT.items():
        value = record.get(name)
        if isinstance(value, Mapping):
            value = value.get("folder", value.get("source", ""))
            value = SHIPPED if value is None else value
        with suppress(ValueError, OverflowError):
            if isinstance(value, (str, int, float)) and value != "":
                found[name] = kind(value)
    return found


def adapter_name(card: AdapterCard | None) -> str:
    """What an adapter is called beside the baselines: by its objective."""
    if card is None:
        return "Raw text"
    name = (card.metadata.get("objective") or {}).get("name")
    # A file may say anything there, and this stands in a table.
    name = name if isinstance(name, str) and name.isidentifier() else card.kind
    return _OBJECTIVES.get(name, name)


def create(models: Models, config: GenerateConfig, compare: bool, report: Report) -> None:
    """Draws the images of a prompt; then, to compare, its first seed without the adapter and with a ridge map."""
    (prompt,) = config.prompt
    others = [place for place in OTHER_MAPS if compare and (place, config.adapter) != ("raw", RAW_TEXT)]
    images = [(prompt, seed) for seed in range(config.seed, config.seed + config.num_images)]
    with models.turn(report):
        drawing = _Drawing(models, config, config.num_images, report, len(others))
        drawing.tell_of_cut(prompt)
        for (_, seed), image in zip(images, drawing.of_prompts(images), strict=True):
            path = drawing.write(image, seed, {"command": redraw_command(config, [prompt], [(prompt, seed)])})
            report(Drawn(path, f"seed {seed} · {prompt}"))
            if compare and seed == config.seed:
                report(Drawn(path, adapter_name(drawing.card), "adapter"))
        for place in others:
            try:
                name = drawing.replace_map(place)
                (image,) = drawing.of_prompts(images[:1])
            except CSDiffError as error:
                drawing.done += drawing.options.steps
                report(Note(f"{OTHER_MAPS[place]}: {error}"))
            else:
                report(Drawn(drawing.write(image, config.seed, {"map": place}), name, place))


def blend(
    models: Models, config: GenerateConfig, second: str | Image.Image, weights: Sequence[float], report: Report
) -> None:
    """Draws `(1 - w) a + w b` of raw image embeddings for every share `w` of the second, all from one seed."""
    (first,), seed = config.prompt, config.seed
    with models.turn(report):
        drawing = _Drawing(models, config, len(weights), report)
        embedder = drawing.embedder
        _, start, negative, _ = embedder.prepare([(first, seed)], drawing.options)
        drawing.tell_of_cut(first)
        if isinstance(second, str):
            end, nearest, other = embedder.embed([second], [noise(seed)]), second, second
            drawing.tell_of_cut(second)
        else:
            end, nearest, other = embedder.image_tower.encode([second]).embeds.to(start), "", "an image"
        # some decoders read the prompt beside the embedding: the nearer one
        beside = [first if weight <= 0.5 else nearest for weight in weights]
        embeds = torch.cat([torch.lerp(start, end, weight) for weight in weights])
        images = drawing.draw(beside, embeds, negative, [noise(seed) for _ in weights])
        for weight, image in zip(weights, images, strict=True):
            path = drawing.write(image, seed, {"blend": {"second": other, "share": weight}})
            report(Drawn(path, f"{round(100 * (1 - weight))} : {round(100 * weight)} · {first} : {other}"))


class _Drawing:
    """One press of the button: its models, its settings, its progress."""

    def __init__(self, models: Models, config: GenerateConfig, count: int, report: Report, others: int = 0):
        self.models, self.count, self.total, self.report = models, count, count + others, report
        report(Progress("Loading the models"))
        self.card, self.source = find_models(config)
        self.options = self.source.sampling(config)
        self.embedder, self.decoder = models.embedder(self.card, self.source), models.decoder(self.source)
        # steps of the images that are finished
        self.done, self.began, self.place = 0, time.monotonic(), "images"

    def tell_of_cut(self, prompt: str) -> None:
        """Tells the page when the text encoder does not read all of a prompt."""
        if said := self.embedder.cut(prompt):
            self.report(Note(said))

    def of_prompts(self, images: Sequence[tuple[str, int]]) -> Iterator[Image.Image]:
        """Images of prompts and seeds."""
        return self.draw(*self.embedder.prepare(images, self.options))

    def draw(self, *prepared: Any) -> Iterator[Image.Image]:
        """Images of what `PromptEmbedder.prepare` gives, with a report at every step."""
        yield from self.decoder.draw(*prepared, self.options, self._stepped)
        self.done += len(prepared[0]) * self.options.steps

    def replace_map(self, place: str) -> str:
        """Puts the text embedding as it is ("raw") or a ridge map in the place of the adapter; returns what it is.

        Raises:
            CSDiffError: there is no such map, or the decoder takes another width.
        """
        self.place = place
        # an adapter inside the text encoder has changed that one
        inside = self.card is not None and self.card.kind == "LoRAAdapter"
        self.embedder = copy.copy(self.models.embedder(None, self.source) if inside else self.embedder)
        if place == "ridge":
            self.embedder.adapter, fitted_to = self.models.ridge(self.card, self.source)
            return f"Ridge, fitted to {fitted_to}"
        self.embedder.adapter, width = None, self.embedder.encoder.dim
        if width != self.source.embedding_dim:
            raise CSDiffError(f"not possible with {width} dimensions, the decoder takes {self.source.embedding_dim}.")
        return OTHER_MAPS[place]

    def _stepped(self, step: int, total: int, preview: Callable[[], Image.Image | None]) -> None:
        steps = self.options.steps
        done, of_all, left = self.done + step, self.total * steps, ""
        number, step = (done - 1) // steps + 1, (done - 1) % steps + 1
        seconds = (time.monotonic() - self.began) / done * (of_all - done)
        # the first step of a model is slower than the rest
        if done > 1 and seconds:
            time_left = f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} min"
            left = f", about {time_left} left"
            self.models.pace = f"; the first has{left[1:]}"
        what = f"Image {number} of {self.count}, " if self.count > 1 else ""
        what = f"To compare: {OTHER_MAPS[self.place].lower()}, " if self.place in OTHER_MAPS else what
        self.report(Progress(f"{what}step {step} of {steps}{left}".capitalize(), done, of_all))
        if step % max(2, steps // 5) == 0 and step < steps and (seen := preview()):
            self.report(Drawn(seen, UNFINISHED, self.place))

    def write(self, image: Image.Image, seed: int, more: Mapping[str, Any]) -> str:
        """Writes a PNG that holds its settings, under a name that says what it is; returns the path."""
        record = to_record(replace(self.options, seed=seed, num_images=1))
        folder = Path(tempfile.mkdtemp(dir=self.models.folder))
        return str(write_picture(folder, picture_name(record["prompt"], seed), image, record | dict(more)))


def read_upload(path: str | None) -> Image.Image:
    """An uploaded image, upright, in RGB, at most 1024 pixels a side.

    Raises:
        CSDiffError: no image, or one whose decoding would take too much memory.
    """
    try:
        image = decode_image(Path(path))
    except (UnreadableImage, OSError) as error:
        # Pillow's own words name folders of this machine.
        ours = str(error).startswith("it")
        said = f": {error}." if ours else " is damaged, or no image that csdiff reads; save it again as PNG or JPEG."
        raise CSDiffError(Path(path).name + said) from error
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image
