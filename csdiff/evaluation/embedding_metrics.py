"""Metrics of predicted image embeddings against the real ones.

Everything takes raw embeddings, rows are samples, and is computed in blocks, so that no N x N matrix is kept.
Directions are compared on the unit sphere; only :func:`norm_ratios` looks at lengths.
"""

import torch
from torch import Tensor

from csdiff.evaluation.distances import (
    centroid_gap,
    covariance_factor,
    distribution_gap,
    frechet_distance,
    kernel_distance,
    unit,
)
from csdiff.evaluation.retrieval import first_rows, image_identities, retrieval

BANDWIDTH = 0.5
"""Kernel width of the reported Cauchy-Schwarz divergence, on unit vectors."""


def cosine_similarities(
    prediction: Tensor, image: Tensor, text: Tensor | None, image_ids: Tensor
) -> dict[str, float | None]:
    """Mean cosine of a prediction to its true image, to its own caption, and to unrelated captions.

    `paired` is high when the prediction lands near its picture; `text` and `unpaired` compare with raw text embeddings
    (own caption; mean over all captions of other pictures) and are None where text has another dimension.

    Args:
        prediction: `(N, D)`.
        image: `(N, D)`.
        text: `(N, Dt)` or None.
        image_ids: `(N,)` picture of each row.
    """
    p = unit(prediction)
    result = {"paired": (p * unit(image)).sum(1).mean().item(), "unpaired": None, "text": None}
    if text is None or text.shape[1] != prediction.shape[1]:
        return result
    t = unit(text)
    result["text"] = (p * t).sum(1).mean().item()
    _, group, sizes = image_ids.to(p.device).unique(return_inverse=True, return_counts=True)
    sums = [
        torch.zeros(len(sizes), z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, group, z) for z in (p, t)
    ]
    pairs = len(p) ** 2 - (sizes.double() ** 2).sum().item()
    if pairs:
        result["unpaired"] = ((p.sum(0) @ t.sum(0) - (sums[0] * sums[1]).sum()) / pairs).item()
    return result


def norm_ratios(prediction: Tensor, image: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the predicted norms over those of the real ones; 1 and 1 are right."""
    p, r = prediction.double().norm(dim=1), image.double().norm(dim=1)
    spread = r.std().item()
    # Unit-norm sets have no spread: two of them agree, anything else is infinitely wide beside them.
    if spread < 1e-6 * r.mean().item():
        ratio = 1.0 if p.std().item() < 1e-4 * p.mean().item() else float("inf")
    else:
        ratio = p.std().item() / spread
    return {"mean_ratio": (p.mean() / r.mean()).item(), "std_ratio": ratio}


def effective_rank(x: Tensor) -> float:
    """`exp(H(s / sum s))` of the singular values `s` of the centred unit vectors (Roy and Vetterli 2007).

    Between 1 (collapsed onto a line) and `min(N - 1, D)`; compare with the value of the real embeddings.
    """
    s = torch.linalg.svdvals(covariance_factor(unit(x)))
    if s.sum() <= 1e-12:
        return 1.0
    share = s / s.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()


def embedding_metrics(
    prediction: Tensor,
    image: Tensor,
    text: Tensor | None = None,
    image_ids: Tensor | None = None,
    bandwidth: float = BANDWIDTH,
) -> dict:
    """Everything above for one set of predictions.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; pictures with several captions repeat.
        text: `(N, Dt)` raw text embeddings, for the cosines to the captions.
        image_ids: `(N,)` picture of each row; by default rows with equal image embeddings are one picture.
        bandwidth: Kernel width of the Cauchy-Schwarz divergence, on unit vectors.

    Returns:
        Nested dict with keys `text_to_image` and `image_to_text` (`r@1`, `r@5`, `r@10`, `median_rank`),
        `centroid_gap`, `distribution_gap`, `frechet_distance`, `kernel_distance`, `cs_divergence`, `cosine`, `norm`,
        `effective_rank`, `count`. Distribution metrics compare all predictions with the distinct pictures.

    Raises:
        ValueError: if the rows do not match or there are fewer than 2 pictures.
    """
    from csdiff.losses import cauchy_schwarz_divergence

    if prediction.shape != image.shape:
        raise ValueError(
            f"predictions and images must have one shape, found {tuple(prediction.shape)} and {tuple(image.shape)}"
        )
    ids = (image_identities(image) if image_ids is None else image_ids).to(prediction.device)
    first = first_rows(ids)
    if len(first) < 2:
        raise ValueError(f"metrics need at least 2 different pictures, found {len(first)}")
    pictures, picture_ids = image[first], ids[first]
    return {
        "count": len(prediction),
        "text_to_image": retrieval(prediction, pictures, ids, picture_ids),
        "image_to_text": retrieval(pictures, prediction, picture_ids, ids),
        "centroid_gap": centroid_gap(prediction, pictures),
        "distribution_gap": distribution_gap(prediction, pictures),
        "frechet_distance": frechet_distance(prediction, pictures),
        "kernel_distance": kernel_distance(prediction, pictures),
        "cs_divergence": cauchy_schwarz_divergence(
            unit(prediction).float(), unit(pictures).float(), bandwidth=bandwidth
        ).item(),
        "cosine": cosine_similarities(prediction, image, text, ids),
        "norm": norm_ratios(prediction, pictures),
        "effective_rank": effective_rank(prediction),
    }


def baseline_predictions(train_text: Tensor, train_image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What the data's own baselines predict: raw text, mean shift and ridge.

    Ridge is the closed form `(T^T T + a I)^-1 T^T Y` of centred data with `a = 0.01 Tr(T^T T) / Dt`.

    Args:
        train_text: `(N, Dt)` text embeddings to fit on.
        train_image: `(N, D)` their images.
        text: `(M, Dt)` text embeddings to predict from.

    Returns:
        `raw_text`, `mean_shift` and `ridge`, each `(M, D)` float32; the first two are absent where dimensions differ.
    """
    text_mean, image_mean = train_text.double().mean(0), train_image.double().mean(0)
    t, y = train_text.double() - text_mean, train_image.double() - image_mean
    gram = t.T @ t
    gram.diagonal().add_(0.01 * gram.diagonal().mean().clamp(min=1e-12))
    weight = torch.linalg.solve(gram, t.T @ y)
    predictions = {"ridge": (text.double() - text_mean) @ weight + image_mean}
    if text.shape[1] == train_image.shape[1]:
        predictions = {"raw_text": text, "mean_shift": text.double() - text_mean + image_mean, **predictions}
    return {name: prediction.float() for name, prediction in predictions.items()}


def cross_fitted_predictions(
    text: Tensor, image: Tensor, image_ids: Tensor, folds: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """Baselines without training data: each fold of the pictures is predicted from a fit to the others.

    Args:
        text: `(N, Dt)`.
        image: `(N, D)`.
        image_ids: `(N,)` picture of each row; captions of a picture stay in one fold.
        folds: Parts, at most as many as there are pictures.
        seed: Of the split.

    Returns:
        As :func:`baseline_predictions`.
    """
    _, picture = image_ids.unique(return_inverse=True)
    count = int(picture.max()) + 1
    fold = (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % folds).to(picture.device)[picture]
    result: dict[str, Tensor] = {}
    for index in range(min(folds, count)):
        out = fold == index
        for name, prediction in baseline_predictions(text[~out], image[~out], text[out]).items():
            result.setdefault(name, torch.empty(len(text), prediction.shape[1], device=text.device))[out] = prediction
    return result


def baseline_metrics(
    train_text: Tensor, train_image: Tensor, text: Tensor, image: Tensor, image_ids: Tensor | None = None
) -> dict:
    """Metrics of :func:`embedding_metrics` for the baselines of :func:`baseline_predictions`.

    Args:
        train_text: `(N, Dt)` text embeddings to fit on.
        train_image: `(N, D)` their images.
        text: `(M, Dt)` held-out text embeddings.
        image: `(M, D)` their images.
        image_ids: `(M,)` picture of each held-out row.

    Returns:
        `{"raw_text": ..., "mean_shift": ..., "ridge": ...}`; the first two are absent where dimensions differ.
    """
    predictions = baseline_predictions(train_text, train_image, text)
    return {name: embedding_metrics(p, image, text, image_ids) for name, p in predictions.items()}
