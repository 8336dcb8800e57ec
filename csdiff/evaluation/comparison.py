"""Adapters side by side: which differences are real, by a paired bootstrap over images.

Frechet distances have no interval: a resample holds an image several times, which lowers the rank of its covariance
and moves the distance by more than the difference that is asked for. Kernel distances answer the same question.
"""

from itertools import combinations

import torch
from torch import Tensor

from csdiff.evaluation.distances import unit
from csdiff.evaluation.embedding_metrics import BANDWIDTH
from csdiff.evaluation.metrics import metric
from csdiff.evaluation.retrieval import RECALLS, first_rows, retrieval_ranks

IMAGES = 5000
"""So many images are resampled at most, drawn evenly; what their captions search in is every image."""
KERNEL_IMAGES = 1500
"""Kernel metrics are resampled on so many at most, one caption each: wider intervals, bounded memory."""


def compare(
    predictions: dict[str, Tensor],
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    resamplings: int = 1000,
    seed: int = 0,
    limit: int | None = IMAGES,
) -> dict:
    """Intervals of every metric of every adapter, and of the difference of every pair of adapters.

    All adapters see the same resamples of the images (with all their captions), so that what is hard for all of them
    cancels out of the difference. Intervals are the 2.5% and 97.5% quantiles of the resampled values, moved so that
    their mean is the value of the whole sample (medians, which move in jumps, are not moved), and reach to that value.
    Pairs of an image with itself are counted once however often a resample holds it: distances of resamples are not
    biased by repeats.

    `predictions` are `(N, D)` of each adapter, by name; `image`, `text` and `image_ids` are those of
    :func:`csdiff.evaluation.embedding_metrics`. At most `limit` images are resampled; None takes all.

    Returns:
        `{"resamplings", "images", "level": 0.95, "intervals": {adapter: {metric: [low, high]}},
        "differences": [...]}`. A difference has `metric` (dotted key), `first` and `second` (adapters), `difference`
        (value of the first minus value of the second), `low` and `high`, `real` (the interval leaves 0 out; never of a
        difference of 0) and `better` (the better one of a real difference, where one can be better). Of a metric that
        is best near some value (`csdiff.evaluation.metrics`) the distances from that value are compared.
    """
    first = first_rows(image_ids)
    gallery = image[first], image_ids[first]
    if limit is not None and len(first) > limit:
        chosen = torch.linspace(0, len(first) - 1, limit).round().long()
        rows = torch.isin(image_ids, gallery[1][chosen])
        predictions = {name: prediction[rows] for name, prediction in predictions.items()}
        image, text, image_ids = image[rows], text[rows], image_ids[rows]
        first = first_rows(image_ids)
    first = first[image_ids[first].argsort()]
    drawn = torch.randint(len(first), (resamplings, len(first)), generator=torch.Generator().manual_seed(seed))
    # How often a resample holds an image; the first row is the sample itself.
    weights = torch.stack([row.bincount(minlength=len(first)) for row in (torch.arange(len(first)), *drawn)]).double()
    values = {
        name: _values(prediction, image, text, image_ids, first, weights, gallery)
        for name, prediction in predictions.items()
    }
    intervals = {name: {key: list(_interval(v, key)) for key, v in mine.items()} for name, mine in values.items()}
    differences = [_difference(key, a, b, values) for a, b in combinations(values, 2) for key in values[a]]
    counts = {"resamplings": resamplings, "images": len(first), "level": 0.95}
    return {**counts, "intervals": intervals, "differences": differences}


def _difference(key: str, a: str, b: str, values: dict[str, dict[str, Tensor]]) -> dict:
    kind, one, other = metric(key), values[a][key], values[b][key]
    if kind.better.startswith("near"):
        one, other = (torch.tensor([kind.loss(v) for v in z.tolist()], dtype=z.dtype) for z in (one, other))
    low, high = _interval(one - other, key)
    difference = (one - other)[0].item()
    # Equal values summed in another order differ in their last bits.
    equal = abs(difference) <= 1e-9 * max(1.0, one[0].abs().item())
    real = not equal and not low <= 0 <= high
    better = (a if (difference > 0) == (kind.better == "higher") else b) if real and kind.better else None
    pair = {"metric": key, "first": a, "second": b}
    return {**pair, "difference": difference, "low": low, "high": high, "real": real, "better": better}


def _interval(values: Tensor, key: str) -> tuple[float, float]:
    """The middle 95% of the resampled values `values[1:]` about that of the sample, `values[0]`."""
    resampled = values[1:]
    quantiles = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=values.dtype))
    if not key.endswith("median_rank"):
        quantiles += values[0] - resampled.mean()
    return min(quantiles[0].item(), values[0].item()), max(quantiles[1].item(), values[0].item())


def _values(
    prediction: Tensor, image: Tensor, text: Tensor, ids: Tensor, first: Tensor, weights: Tensor, gallery: tuple
) -> dict[str, Tensor]:
    """Every metric `(B,)` under every row of weights `(B, P)` of the images, whose first rows are `first`."""
    images = image[first]
    rows = weights[:, ids.unique(return_inverse=True)[1]]
    result: dict[str, Tensor] = {}
    forward = retrieval_ranks(prediction, gallery[0], ids, gallery[1])
    backward = retrieval_ranks(images, prediction, ids[first], ids)
    for name, ranks, weight in (("text_to_image", forward, rows), ("image_to_text", backward, weights)):
        for k in RECALLS:
            result[f"{name}.r@{k}"] = _mean(ranks.hits(k), weight)
        result[f"{name}.median_rank"] = _median(ranks.expected(), weight)
    p, y = unit(prediction), unit(images)
    result["centroid_gap"] = (_mean(p, rows) - _mean(y, weights)).norm(dim=1)
    result |= _kernel_values(p[first], y, weights)
    result["cosine.paired"] = _mean((p * unit(image)).sum(1), rows)
    if text.shape[1] == prediction.shape[1]:
        result["cosine.text"] = _mean((p * unit(text)).sum(1), rows)
    predicted = _moments(prediction.double().norm(dim=1), rows)
    real = _moments(images.double().norm(dim=1), weights)
    result["norm.mean_ratio"] = predicted[0] / real[0]
    if (real[1] > 1e-6 * real[0]).all():
        result["norm.std_ratio"] = predicted[1] / real[1]
    return result


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `(N,)` values, or of the rows of `(N, D)`, under each row of weights `(B, N)`."""
    total = weights.sum(1)
    return weights @ values / (total if values.ndim == 1 else total[:, None])


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean, middle = _mean(values, weights), values.mean()
    spread = _mean((values - middle).square(), weights) - (mean - middle).square()
    return mean, spread.clamp(min=0).sqrt()


def _median(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted median `(B,)` of `(N,)` values, midway between the two in the middle where there are two."""
    values, order = values.sort()
    reached = weights[:, order].cumsum(1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(1), (reached <= half).sum(1)
    return (values[lower] + values[upper]) / 2


def _kernel_values(p: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
    chosen = torch.linspace(0, len(p) - 1, min(len(p), KERNEL_IMAGES)).long().unique()
    p, y, w = p[chosen].float(), y[chosen].float(), weights[:, chosen].float()
    pairs, singles = (w.sum(1) ** 2 - w.square().sum(1)).double(), w.sum(1).double()

    def sums(kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums off the diagonal and on it."""
        diagonal = kernel.diagonal()
        return (((w @ kernel) * w).sum(1) - w.square() @ diagonal).double(), (w @ diagonal).double()

    products = {"pp": p @ p.T, "yy": y @ y.T, "py": p @ y.T}
    cubic = {pair: sums((z + 1).pow(3)) for pair, z in products.items()}
    within = sum(cubic[pair][0] / pairs for pair in ("pp", "yy"))
    gauss = {pair: sum(sums(torch.exp((z - 1) / BANDWIDTH**2))) / (pairs + singles) for pair, z in products.items()}
    return {
        "kernel_distance": 1000 * (within - 2 * sum(cubic["py"]) / (pairs + singles)),
        "cs_divergence": gauss["pp"].log() + gauss["yy"].log() - 2 * gauss["py"].log(),
    }
