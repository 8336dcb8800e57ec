"""Pictures between two prompts, or between a prompt and a picture."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from csdiff.app.drawing import Drawn, Progress, Session, Settings
from csdiff.app.models import Models
from csdiff.app.pictures import write_png
from csdiff.app.streaming import Report
from csdiff.errors import CSDiffError

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def blend(
    models: Models, settings: Settings, second: str | Image.Image, weights: tuple[float, ...], report: Report
) -> None:
    """Draws `(1 - w) a + w b` of raw image embeddings for every weight `w`, all from one seed.

    Args:
        models: where the models come from.
        settings: with `prompt` the first of the two.
        second: a prompt, or a picture.
        weights: the share of the second, from 0 to 1.
        report: is told of progress and pictures.

    Raises:
        CSDiffError: an empty prompt, or a weight out of range.
    """
    for number, text in enumerate((settings.prompt, second), start=1):
        if isinstance(text, str) and not text.strip():
            raise CSDiffError(f"Expected two prompts, or a prompt and a picture; number {number} is empty.")
    if not all(0 <= weight <= 1 for weight in weights):
        raise CSDiffError(f"Expected a share from 0 to 1, found {weights}.")
    config = settings.options(models)
    if isinstance(second, str):
        replace(settings, prompt=second).options(models)
    report(Progress("Loading the models"))
    card, source = models.find(settings.adapter, settings.decoder)
    with models.turn(lambda text: report(Progress(text))):
        session = Session(models, card, source, config, report)
        session.total = len(weights)
        first = settings.prompt.strip()
        generators = [torch.Generator("cpu").manual_seed(config.seed)]
        start = session.embed(first, generators)
        if isinstance(second, str):
            generators = [torch.Generator("cpu").manual_seed(config.seed)]
            end = session.embed(second.strip(), generators)
        else:
            end = models.image_embeds(session.embedder, second)
        negative = session.negative()
        for weight in weights:
            generator = torch.Generator("cpu").manual_seed(config.seed)
            # some decoders read the prompt beside the embedding: the nearer one
            nearer = first if weight <= 0.5 else second.strip() if isinstance(second, str) else ""
            image = session.draw(nearer, torch.lerp(start, end, weight), negative, generator)
            record = {"first": first, "second": second if isinstance(second, str) else "a picture", "share": weight}
            path = write_png(models.folder, image, f"{first}-{round(100 * weight)}", config.seed, record)
            report(Drawn(path, f"{round(100 * (1 - weight))} : {round(100 * weight)}"))
