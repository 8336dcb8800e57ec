"""The adapter as others load it: averaged weights, calibrated norms, a complete `csdiff.json`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from csdiff.adapters.base import Adapter
from csdiff.training.build import all_objective_options
from csdiff.training.config import TrainConfig
from csdiff.training.data import TrainingData
from csdiff.training.inputs import Inputs
from csdiff.training.task import AlignmentTask

# Norms are calibrated on this many rows at most, and on held-out ones where there are enough for two numbers.
_CALIBRATION_ROWS = 4096
_HELD_OUT_ROWS = 256
_FROM_THE_STORE = ("text_encoder", "image_encoder", "tokenizer", "preprocessing")


class Exporter:
    """Writes adapter folders from a run; `pause` is called between blocks of rows, and may raise."""

    def __init__(
        self, config: TrainConfig, data: TrainingData, task: AlignmentTask, inputs: Inputs, pause: Callable[[], None]
    ):
        self.config, self.data, self.task, self.inputs, self.pause = config, data, task, inputs, pause
        # An image adapter has norms of its own.
        self.calibrates = config.calibrate_norm and task.embedder.image_adapter is None
        self.held_out = data.validation is not None and len(data.validation) >= _HELD_OUT_ROWS
        # A validation and the checkpoint after it calibrate the same weights.
        self._calibrated: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def weights(self, step: int, averaged: bool) -> Iterator[Adapter]:
        """The adapter with the averaged or online weights of a step, norms calibrated; all is put back afterwards."""
        embedder, adapter = self.task.embedder, self.task.embedder.adapter
        before = adapter.norm_scale.clone(), adapter.norm_shift.clone()
        embedder.eval()
        try:
            with self.task.ema.applied() if averaged else nullcontext():
                if self.calibrates:
                    self._calibrate(adapter, (step, averaged))
                yield adapter
        finally:
            adapter.norm_scale.copy_(before[0])
            adapter.norm_shift.copy_(before[1])
            embedder.train()

    @torch.no_grad()
    def _calibrate(self, adapter: Adapter, weights: tuple[int, bool]) -> None:
        if weights not in self._calibrated:
            predicted, real = self._norms()
            if predicted.isfinite().all() and predicted.min() > 0:
                adapter.calibrate_norm(predicted, real)
            self._calibrated[weights] = adapter.norm_scale.clone(), adapter.norm_shift.clone()
        scale, shift = self._calibrated[weights]
        adapter.norm_scale.copy_(scale)
        adapter.norm_shift.copy_(shift)

    @cached_property
    def _rows(self) -> list[dict]:
        # Norms fitted on what was trained on would hide what overfitting does to those of new captions.
        pairs = self.data.validation if self.held_out else self.data.train
        return self.inputs.read(pairs.sample(_CALIBRATION_ROWS))

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Norms of predictions of the weights that are in the model now, and of the real embeddings."""
        torch.manual_seed(0)
        norms = []
        for rows in self._rows:
            self.pause()
            norms.append(self.task.embedder.predict(rows)["prediction"].norm(dim=1))
        return torch.cat(norms), torch.cat([rows["image_embeds"].norm(dim=1) for rows in self._rows])

    def write(self, folder: Path, step: int, metrics: dict, averaged: bool = True) -> None:
        """Write the adapter folder (and the image adapter's below it)."""
        image_adapter = self.task.embedder.image_adapter
        with self.weights(step, averaged) as adapter:
            adapter.metadata = self._metadata(step, metrics, averaged)
            adapter.save_pretrained(folder)
            if image_adapter is not None:
                image_adapter.metadata = adapter.metadata
                image_adapter.save_pretrained(folder / "image_adapter")

    def _metadata(self, step: int, metrics: dict, averaged: bool) -> dict:
        """Content of `csdiff.json`."""
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
                "held_out": 0 if data.validation is None else len(data.validation),
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
