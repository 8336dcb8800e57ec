"""Copies of the trained weights as others get them: written as adapter folders, drawn, measured on held-out pairs."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError, did_you_mean
from csdiff.evaluation.baselines import baseline_metrics
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import metric
from csdiff.files import flatten
from csdiff.pipelines.config import GenerateConfig
from csdiff.training.config import TrainConfig, ValidationConfig
from csdiff.training.data import TrainingData
from csdiff.training.inputs import Inputs
from csdiff.training.model import Embedder, all_objective_options
from csdiff.training.optimization import copy_weights
from csdiff.training.task import AlignmentTask

# Norms are calibrated on this many rows at most, and on held-out ones where there are enough for two numbers.
_CALIBRATION_ROWS = 4096
_HELD_OUT_ROWS = 256
_FROM_THE_STORE = ("text_encoder", "image_encoder", "tokenizer", "preprocessing")


class Snapshots:
    """Copies what a run has trained, ready for use; the run itself stays as it is."""

    def __init__(self, config: TrainConfig, data: TrainingData, task: AlignmentTask, inputs: Inputs):
        self.config, self.data, self.task, self.inputs = config, data, task, inputs
        # An image adapter has norms of its own.
        self.calibrates = config.calibrate_norm and task.embedder.image_adapter is None
        self.held_out = len(data.validation or ()) >= _HELD_OUT_ROWS
        # A validation and the checkpoint after it calibrate the same weights.
        self._calibrations: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def take(self, step: int, averaged: bool = True) -> Embedder:
        """The embedder with the averaged or online weights of a step, norms calibrated, for evaluation."""
        trained = self.task.embedder
        # Frozen weights, as those of a text encoder, are shared.
        shared = {id(p): p for p in trained.parameters() if not p.requires_grad}
        made = Embedder(*copy.deepcopy((trained.adapter, trained.image_adapter), shared)).eval()
        if averaged:
            weights = {f"embedder.{name}": p for name, p in made.named_parameters() if p.requires_grad}
            copy_weights(self.task.ema.average, weights)
        if self.calibrates:
            adapter = made.adapter
            if (step, averaged) not in self._calibrations:
                self._calibrate(made)
                self._calibrations[step, averaged] = adapter.norm_scale, adapter.norm_shift
            adapter.norm_scale, adapter.norm_shift = self._calibrations[step, averaged]
        return made

    def _calibrate(self, embedder: Embedder) -> None:
        torch.manual_seed(0)
        predicted = torch.cat([embedder.predict(rows)["prediction"].norm(dim=1) for rows in self._rows])
        if predicted.isfinite().all() and predicted.min() > 0:
            real = torch.cat([rows["image_embeds"].norm(dim=1) for rows in self._rows])
            embedder.adapter.calibrate_norm(predicted, real)

    @cached_property
    def _rows(self) -> list[dict]:
        # Norms fitted on what was trained on would hide what overfitting does to those of new captions.
        pairs = self.data.validation if self.held_out else self.data.train
        return self.inputs.read(pairs.sample(_CALIBRATION_ROWS))

    def write(self, folder: Path, step: int, metrics: dict, averaged: bool = True) -> None:
        """Write the adapter folder (and the image adapter's below it)."""
        made, metadata = self.take(step, averaged), self._metadata(step, metrics, averaged)
        for adapter, place in ((made.adapter, folder), (made.image_adapter, folder / "image_adapter")):
            if adapter is not None:
                adapter.metadata = metadata
                adapter.save_pretrained(place, of_this_run=True)

    def draw(self, step: int) -> list[Path]:
        """Draw the prompts of a run with the averaged weights, always from the same noise.

        The images go to `OUTPUT_DIR/pictures/step-...`; what is left of an unfinished drawing is removed, whatever
        ended it.
        """
        from csdiff.pipelines.generate import generate

        target = Path(self.config.output_dir) / "pictures" / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory() as adapter:
                self.write(Path(adapter), step, {})
                drawing = GenerateConfig(
                    prompt=list(self.config.validation.prompts),
                    adapter=adapter,
                    decoder=self.config.validation.decoder,
                    output=str(target),
                    seed=self.config.seed,
                    grid=False,
                    progress=False,
                )
                return generate(drawing)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    def _metadata(self, step: int, metrics: dict, averaged: bool) -> dict:
        config, data = self.config, self.data
        statistics = data.train.statistics("image_embeds")
        return {
            **{key: data.fingerprint.get(key) for key in _FROM_THE_STORE},
            "statistics": {key: getattr(statistics, key) for key in ("count", "norm_mean", "norm_std")},
            "normalized": data.store.normalized,
            "objective": {"name": config.objective, "options": all_objective_options(config)},
            "data": {
                "train": config.data.train,
                "store": str(data.store.path),
                "rows": len(data.train),
                "held_out": len(data.validation or ()),
                "source": data.fingerprint.get("data"),
            },
            "training": {
                "adapter": config.adapter,
                "steps": step,
                "batch_size": config.batch_size,
                "learning_rate": config.learning_rate,
                "seed": config.seed,
                "threads": config.threads,
                "weights": "average" if averaged else "online",
                "ema_decay": config.ema.decay,
                "norm_calibration": "none" if not self.calibrates else "held-out" if self.held_out else "training",
            },
            "metrics": metrics,
        }


class Validator:
    """Measures predictions on fixed held-out rows, prepared for the embedder.

    Whether more of a metric is better tells in mode `auto` the table of metrics; of a few neither is: then more.
    """

    def __init__(self, batches: list[dict], config: ValidationConfig):
        self.batches, self.metric, self.mode = batches, config.metric, config.mode
        self.image = torch.cat([rows["image_embeds"] for rows in batches]).float()
        self.text = torch.cat([rows["text_embeds"] for rows in batches]).float()

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
        fitted = (train[f"{side}_embeds"].to(self.image.device) for side in ("text", "image"))
        return baseline_metrics(*fitted, self.text, self.image)

    def value(self, metrics: dict) -> float | None:
        """The metric that decides, or None where it could not be measured; CSDiffError for an unknown name."""
        if "error" in metrics:
            return None
        flat = flatten(metrics)
        if self.metric not in flat:
            near = did_you_mean(self.metric, flat) or "."
            raise CSDiffError(f"--validation.metric {self.metric}: expected one of {', '.join(sorted(flat))}{near}")
        return flat[self.metric]

    def better(self, value: float | None, best: float | None) -> bool:
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
