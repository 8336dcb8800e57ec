"""Images of fixed prompts while an adapter is trained."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.training.config import TrainConfig
from csdiff.training.export import Exporter

_IMAGES = "pictures"


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
        decoder, store = resolve_decoder(config.validation.decoder), exporter.data.store
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

    def draw(self, folder: Path, step: int, trackers: list) -> None:
        """Draw with the averaged weights into `folder/pictures/step-...`, and show them to trackers that can.

        What is left of an unfinished drawing is removed, whatever ended it.
        """
        from csdiff.pipelines.generate import generate

        target = folder / _IMAGES / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        with tempfile.TemporaryDirectory() as adapter:
            self.exporter.write(Path(adapter), step, {})
            try:
                with self.at_once():
                    files = generate(
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
        images = {str(i): np.asarray(Image.open(file).convert("RGB"))[None] for i, file in enumerate(files)}
        for tracker in trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(images, step=step, dataformats="NHWC")
