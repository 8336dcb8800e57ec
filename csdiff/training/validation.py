"""How good the adapter is on held-out pairs, during training."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_metrics
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import metric
from csdiff.files import flatten
from csdiff.training.task import AlignmentTask


class Validator:
    """Measures predictions on fixed held-out rows.

    Args:
        batches: Held-out rows, prepared for the embedder, on its device.
        key: Dotted key of the metric that tells the best checkpoint.
        mode: `max`, `min`, or `auto` by the table of metrics, which says of a few that neither is better: then `max`.
        pause: Called between blocks of rows; may raise.
    """

    def __init__(self, batches: list[dict], key: str, mode: str = "auto", pause: Callable[[], None] = lambda: None):
        self.batches, self.metric, self.mode, self.pause = batches, key, mode, pause
        self.image = torch.cat([rows["image_embeds"] for rows in batches]).float()
        texts = [rows.get("text_embeds") for rows in batches]
        self.text = None if texts[0] is None else torch.cat(texts).float()

    @torch.no_grad()
    def measure(self, task: AlignmentTask) -> dict:
        """Metrics of the weights that are in the model now; the embeddings' own dimension decides on text cosines."""
        was_training = task.embedder.training
        task.embedder.eval()
        # Samplers draw noise: the same noise at every validation. Training seeds every step itself.
        torch.manual_seed(0)
        embedded = []
        try:
            for rows in self.batches:
                self.pause()
                with task.autocast():
                    embedded.append(task.embedder.predict(rows))
            self.pause()
        finally:
            task.embedder.train(was_training)
        prediction = torch.cat([e["prediction"] for e in embedded])
        image = torch.cat([e["image"] for e in embedded]) if "image" in embedded[0] else self.image
        if not prediction.isfinite().all():
            return {"count": len(prediction), "error": "predictions are not finite"}
        return embedding_metrics(prediction, image, self.text)

    def baselines(self, train_text: Tensor, train_image: Tensor) -> dict:
        """Metrics of raw text, mean shift and ridge on the same rows."""
        if self.text is None:
            return {}
        device = self.image.device
        return baseline_metrics(train_text.to(device), train_image.to(device), self.text, self.image)

    def value(self, metrics: dict) -> float | None:
        """The metric that decides, or None where it could not be measured.

        Raises:
            CSDiffError: if there is no metric of that name.
        """
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
        """How bad a value is."""
        with suppress(KeyError, ValueError):
            if self.mode == "auto":
                return metric(self.metric).loss(value)
        return value if self.mode == "min" else -value
