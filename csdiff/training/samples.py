"""Pictures of fixed prompts while an adapter is trained, and `samples.png`, a sheet of how they came to be."""

import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from csdiff.errors import CSDiffError
from csdiff.files import writing
from csdiff.pipelines.config import GenerateConfig
from csdiff.training.config import TrainConfig
from csdiff.training.export import Exporter

SHEET_NAME = "samples.png"
_PICTURES = "pictures"
_ROWS = 6
_CELL, _LABEL, _GAP = 160, 20, 6


class Samples:
    """Draws the prompts of a run with its decoder, always from the same noise.

    Args:
        config: The run; `validation.decoder` is given.
        exporter: Writes the adapter that is used.
        at_once: Context in which a signal may end the drawing.

    Raises:
        CSDiffError: no such decoder, or one of another width than the image embeddings.
    """

    def __init__(
        self,
        config: TrainConfig,
        exporter: Exporter,
        at_once: Callable[[], AbstractContextManager] = nullcontext,
    ):
        from csdiff.pipelines.decoders import resolve_decoder

        self.config, self.exporter, self.at_once = config, exporter, at_once
        decoder, store = resolve_decoder(config.validation.decoder), exporter.sources.store
        if decoder.embedding_dim is not None and decoder.embedding_dim != store.image_dim:
            raise CSDiffError(
                f"--validation.decoder {config.validation.decoder} takes image embeddings of width "
                f"{decoder.embedding_dim}, and {store.path} has {store.image_dim}: give the decoder of that encoder."
            )
        if store.normalized:
            raise CSDiffError(
                f"--validation.decoder: decoders need raw embeddings, and {store.path} holds unit-norm ones: leave "
                "the decoder out, or embed the data again."
            )

    def draw(self, folder: Path, step: int) -> list[Path]:
        """Draw with the averaged weights into `folder/pictures/step-...`; returns the files.

        What is left of an unfinished drawing is removed, whatever ended it.
        """
        from csdiff.pipelines.generate import generate

        target = folder / _PICTURES / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        with tempfile.TemporaryDirectory() as adapter:
            self.exporter.write(Path(adapter), step, {})
            try:
                with self.at_once():
                    return generate(
                        GenerateConfig(
                            prompt=list(self.config.validation.prompts),
                            adapter=adapter,
                            decoder=self.config.validation.decoder,
                            output=str(target),
                            seed=self.config.seed,
                            grid=False,
                            progress=False,
                        )
                    )
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise


def draw_sheet(folder: Path, prompts: list[str], seed: int) -> Path | None:
    """Lay the pictures of a run out: a column a prompt, a row a validation, first and last and some between.

    Args:
        folder: Of the run.
        prompts: In the order of the columns.
        seed: Of the pictures.

    Returns:
        The picture, or None when nothing is drawn yet.
    """
    from csdiff.pipelines.pictures import picture_name

    steps = sorted(path for path in (folder / _PICTURES).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    if not steps:
        return None
    count = min(_ROWS, len(steps))
    shown = [steps[place * (len(steps) - 1) // max(1, count - 1)] for place in range(count)]
    left = 70
    size = left + len(prompts) * (_CELL + _GAP), _LABEL + len(shown) * (_CELL + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, prompt in enumerate(prompts):
        x = left + column * (_CELL + _GAP)
        pen.text((x, 3), _fitted(pen, prompt, font), fill="black", font=font)
        for row, step in enumerate(shown):
            y = _LABEL + row * (_CELL + _GAP)
            pen.text((4, y + _CELL // 2 - 6), f"{int(step.name[5:]):,}", fill="black", font=font)
            file = step / f"{picture_name(prompt, seed)}.png"
            if file.is_file():
                with Image.open(file) as picture:
                    sheet.paste(ImageOps.contain(picture.convert("RGB"), (_CELL, _CELL)), (x, y))
    target = folder / SHEET_NAME
    with writing(target, "wb") as file:
        sheet.save(file, format="PNG")
    return target


def _fitted(pen: ImageDraw.ImageDraw, text: str, font) -> str:
    """Text cut to the width of a cell."""
    if pen.textlength(text, font) <= _CELL:
        return text
    while text and pen.textlength(f"{text}...", font) > _CELL:
        text = text[:-1]
    return f"{text}..."
