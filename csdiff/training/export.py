"""The adapter as others load it: averaged weights, calibrated norms, a complete `csdiff.json`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from csdiff.adapters.base import Adapter
from csdiff.training.config import TrainConfig
from csdiff.training.inputs import Inputs
from csdiff.training.sources import Sources
from csdiff.training.task import AlignmentTask

_CALIBRATION_ROWS = 4096
IMAGE_ADAPTER = "image_adapter"
ONLINE = "online"


class Exporter:
    """Writes adapter folders from a run.

    Args:
        config: The run.
        sources: Its data.
        task: Its weights.
        inputs: Prepares the training rows that norms are calibrated on.
    """

    def __init__(self, config: TrainConfig, sources: Sources, task: AlignmentTask, inputs: Inputs):
        self.config, self.sources, self.task, self.inputs = config, sources, task, inputs
        self.statistics = sources.train.statistics("image_embeds")
        self._rows: list[dict] | None = None

    @contextmanager
    def weights(self, averaged: bool) -> Iterator[Adapter]:
        """The adapter with averaged or online weights and calibrated norms; afterwards everything is as it was."""
        task, adapter = self.task, self.task.embedder.adapter
        was_training = task.embedder.training
        before = adapter.norm_scale.clone(), adapter.norm_shift.clone()
        task.embedder.eval()
        try:
            with task.ema.applied() if averaged else nullcontext():
                if self.config.calibrate_norm and task.embedder.image_adapter is None:
                    self._calibrate(adapter)
                yield adapter
        finally:
            adapter.norm_scale.copy_(before[0])
            adapter.norm_shift.copy_(before[1])
            task.embedder.train(was_training)

    @torch.no_grad()
    def _calibrate(self, adapter: Adapter) -> None:
        if self._rows is None:
            self._rows = self.inputs.read(self.sources.train.sample(_CALIBRATION_ROWS))
        torch.manual_seed(0)
        predicted = torch.cat([self.task.embedder.predict(rows)["prediction"].norm(dim=1) for rows in self._rows])
        real = torch.cat([rows["image_embeds"].norm(dim=1) for rows in self._rows])
        if predicted.isfinite().all() and predicted.min() > 0:
            adapter.calibrate_norm(predicted, real)

    def write(self, folder: Path, step: int, metrics: dict, averaged: bool = True) -> None:
        """Write the adapter folder (and the image adapter's below it)."""
        with self.weights(averaged) as adapter:
            adapter.metadata = self.metadata(step, metrics, averaged)
            adapter.save_pretrained(folder)
            if self.task.embedder.image_adapter is not None:
                image_adapter = self.task.embedder.image_adapter
                image_adapter.metadata = adapter.metadata
                image_adapter.save_pretrained(folder / IMAGE_ADAPTER)

    def metadata(self, step: int, metrics: dict, averaged: bool) -> dict:
        """Content of `csdiff.json`."""
        config, fingerprint = self.config, self.sources.fingerprint
        return {
            **{key: fingerprint.get(key) for key in ("text_encoder", "image_encoder", "tokenizer", "preprocessing")},
            "statistics": {
                "count": self.statistics.count,
                "norm_mean": self.statistics.norm_mean,
                "norm_std": self.statistics.norm_std,
            },
            "normalized": self.sources.store.normalized,
            "objective": {"name": config.objective, "options": config.objective_options},
            "data": {
                "train": config.data.train,
                "rows": len(self.sources.train),
                "held_out": 0 if self.sources.validation is None else len(self.sources.validation),
                "source": fingerprint.get("data"),
            },
            "training": {
                "adapter": config.adapter,
                "steps": step,
                "batch_size": config.batch_size,
                "learning_rate": config.learning_rate,
                "seed": config.seed,
                "weights": "average" if averaged else "online",
                "ema_decay": config.ema.decay,
            },
            "metrics": metrics,
        }
