"""Pictures of fixed prompts while an adapter is trained."""

import tempfile
from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.training.config import TrainConfig
from csdiff.training.export import Exporter


class Samples:
    """Draws the prompts of a run with its decoder, always from the same noise.

    Args:
        config: The run; `validation.decoder` is given.
        exporter: Writes the adapter that is used.

    Raises:
        CSDiffError: no such decoder, or one of another width than the image embeddings.
    """

    def __init__(self, config: TrainConfig, exporter: Exporter):
        from csdiff.pipelines.decoders import resolve_decoder

        self.config, self.exporter = config, exporter
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
        """Draw into `folder/step-...` with the averaged weights; returns the files."""
        from csdiff.pipelines.generate import generate

        with tempfile.TemporaryDirectory() as adapter:
            self.exporter.write(Path(adapter), step, {})
            return generate(
                GenerateConfig(
                    prompt=list(self.config.validation.prompts),
                    adapter=adapter,
                    decoder=self.config.validation.decoder,
                    output=str(folder / f"step-{step:08d}"),
                    seed=self.config.seed,
                    progress=False,
                )
            )
