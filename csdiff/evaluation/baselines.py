"""What the data predict by themselves: raw text, mean shift and ridge, fitted to training pairs or cross-fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from csdiff.adapters.linear import LinearAdapter
from csdiff.evaluation.embedding_metrics import embedding_metrics


@torch.no_grad()
def baseline_predictions(train_text: Tensor, train_image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Predictions `(M, D)`, float32, of `(M, Dt)` text embeddings, by name of the baseline.

    `raw_text` as it is; `mean_shift` and `ridge` as `csdiff.adapters.LinearAdapter` fits them to `(N, Dt)` text
    embeddings and their `(N, D)` images: the penalty is chosen on a tenth of the rows, and the norms are calibrated.
    The first two are absent where dimensions differ; nothing is fitted to fewer than 4 rows.
    """
    same = text.shape[1] == train_image.shape[1]
    result = {"raw_text": text.float()} if same else {}
    if len(train_text) >= 4:
        for method in ("mean_shift", "ridge") if same else ("ridge",):
            fitted = LinearAdapter.fit([(train_text, train_image)], method)
            result[method] = fitted.eval().embed(text.float().cpu()).to(text.device)
    return result


def cross_fitted_predictions(
    text: Tensor, image: Tensor, image_ids: Tensor, folds: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """The :func:`baseline_predictions` without training data: each fold is predicted from a fit to the others.

    `text` is `(N, Dt)` and `image` `(N, D)`; captions of one image, as `image_ids` `(N,)` has it, stay in one fold.
    There are at most as many folds as images, drawn from `seed`.
    """
    values, number = image_ids.unique(return_inverse=True)
    count = len(values)
    fold = (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % folds).to(number.device)[number]
    result: dict[str, Tensor] = {}
    for index in range(min(folds, count)):
        out = fold == index
        for name, prediction in baseline_predictions(text[~out], image[~out], text[out]).items():
            result.setdefault(name, torch.empty(len(text), prediction.shape[1], device=text.device))[out] = prediction
    return result


def baseline_metrics(
    train_text: Tensor, train_image: Tensor, text: Tensor, image: Tensor, image_ids: Tensor | None = None
) -> dict:
    """:func:`embedding_metrics` of the held-out `text`, `image`, by name of the :func:`baseline_predictions`."""
    predictions = baseline_predictions(train_text, train_image, text)
    return {name: embedding_metrics(p, image, text, image_ids) for name, p in predictions.items()}
