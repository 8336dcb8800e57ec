"""The adapter as others load it: averaged weights, calibrated norms, a complete `csdiff.json`."""

import copy
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from csdiff.training.config import TrainConfig
from csdiff.training.data import TrainingData
from csdiff.training.embedder import Embedder
from csdiff.training.inputs import Inputs
from csdiff.training.objective import all_objective_options
from csdiff.training.optimization import copy_weights
from csdiff.training.task import AlignmentTask

# Norms are calibrated on this many rows at most, and on held-out ones where there are enough for two numbers.
_CALIBRATION_ROWS = 4096
_HELD_OUT_ROWS = 256
_FROM_THE_STORE = ("text_encoder", "image_encoder", "tokenizer", "preprocessing")


class Exporter:
    """Copies what a run has trained, ready for use; the run itself stays as it is."""

    def __init__(self, config: TrainConfig, data: TrainingData, task: AlignmentTask, inputs: Inputs):
        self.config, self.data, self.task, self.inputs = config, data, task, inputs
        # An image adapter has norms of its own.
        self.calibrates = config.calibrate_norm and task.embedder.image_adapter is None
        self.held_out = data.validation is not None and len(data.validation) >= _HELD_OUT_ROWS
        # A validation and the checkpoint after it calibrate the same weights.
        self._calibrations: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def copy(self, step: int, averaged: bool = True) -> Embedder:
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
        made, metadata = self.copy(step, averaged), self._metadata(step, metrics, averaged)
        for adapter, place in ((made.adapter, folder), (made.image_adapter, folder / "image_adapter")):
            if adapter is not None:
                adapter.metadata = metadata
                adapter.save_pretrained(place)

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
