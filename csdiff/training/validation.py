"""How good the adapter is on held-out pairs, and what it draws, during training."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor

from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_metrics
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import metric
from csdiff.files import flatten
from csdiff.pipelines.config import GenerateConfig
from csdiff.training.config import TrainConfig, ValidationConfig
from csdiff.training.embedder import Embedder
from csdiff.training.export import Exporter


class Validator:
    """Measures predictions on fixed held-out rows, prepared for the embedder.

    Whether more of a metric is better tells in mode `auto` the table of metrics; of a few neither is: then more.
    """

    def __init__(self, batches: list[dict], config: ValidationConfig):
        self.batches, self.metric, self.mode = batches, config.metric, config.mode
        self.image = torch.cat([rows["image_embeds"] for rows in batches]).float()
        texts = [rows["text_embeds"] for rows in batches if "text_embeds" in rows]
        self.text = torch.cat(texts).float() if texts else None

    @torch.no_grad()
    def measure(self, embedder: Embedder, autocast: Callable[[], AbstractContextManager]) -> dict:
        """Metrics of an embedder that computes in a context; the embeddings' own dimension decides on text cosines."""
        # Samplers draw noise: the same noise at every validation. Training seeds every step itself.
        torch.manual_seed(0)
        with autocast():
            embedded = [embedder.predict(rows) for rows in self.batches]
        prediction = torch.cat([e["prediction"] for e in embedded])
        image = torch.cat([e["image"] for e in embedded]) if "image" in embedded[0] else self.image
        if not prediction.isfinite().all():
            return {"count": len(prediction), "error": "predictions are not finite"}
        return embedding_metrics(prediction, image, self.text)

    def baselines(self, train: dict[str, Tensor]) -> dict:
        """Metrics of raw text, mean shift and ridge on the same rows, fitted to training pairs."""
        if self.text is None:
            return {}
        fitted = (train[f"{side}_embeds"].to(self.image.device) for side in ("text", "image"))
        return baseline_metrics(*fitted, self.text, self.image)

    def value(self, metrics: dict) -> float | None:
        """The metric that decides, or None where it could not be measured; CSDiffError for an unknown name."""
        if "error" in metrics:
            return None
        flat = flatten(metrics)
        if self.metric not in flat:
            raise CSDiffError(f"--validation.metric {self.metric}: expected one of {', '.join(sorted(flat))}.")
        return flat[self.metric]

    def better(self, value: float | None, best: float | None) -> bool:
        """Whether a value beats the best so far."""
        return value is not None and (best is None or self._loss(value) < self._loss(best))

    def _loss(self, value: float) -> float:
        with suppress(KeyError, ValueError):
            if self.mode == "auto":
                return metric(self.metric).loss(value)
        return value if self.mode == "min" else -value


def check_decoder(name: str, store: EmbeddingStore) -> None:
    """Refuse a decoder that cannot draw what is trained on a store."""
    from csdiff.pipelines.decoders import AdapterCard, check_pairing, resolve_decoder

    metadata = {**(store.fingerprint or {}), "normalized": store.normalized}
    try:
        check_pairing(AdapterCard(store.path, {"embedding_dim": store.image_dim}, metadata), resolve_decoder(name))
    except CSDiffError as error:
        raise CSDiffError(f"--validation.decoder: {error}") from error


def draw(config: TrainConfig, exporter: Exporter, step: int) -> list[Path]:
    """Draw the prompts of a run with the averaged weights, always from the same noise.

    The images go to `OUTPUT_DIR/pictures/step-...`; what is left of an unfinished drawing is removed, whatever ended
    it.
    """
    from csdiff.pipelines.generate import generate

    target = Path(config.output_dir) / "pictures" / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as adapter:
            exporter.write(Path(adapter), step, {})
            drawing = GenerateConfig(
                prompt=list(config.validation.prompts),
                adapter=adapter,
                decoder=config.validation.decoder,
                output=str(target),
                seed=config.seed,
                grid=False,
                progress=False,
            )
            return generate(drawing)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
