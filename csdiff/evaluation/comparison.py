"""Adapters side by side: which differences are real, by a paired bootstrap over pictures.

Frechet distances have no interval: a resample holds a picture several times, which lowers the rank of its covariance
and moves the distance by more than the difference that is asked for. Kernel distances answer the same question.
"""

from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from torch import Tensor

from csdiff.evaluation.distances import unit
from csdiff.evaluation.embedding_metrics import BANDWIDTH
from csdiff.evaluation.retrieval import first_rows, retrieval_ranks

HIGHER = ("r@1", "r@5", "r@10", "cosine.paired")
KERNEL_PICTURES = 1500
"""Kernel metrics are resampled on so many pictures at most, one caption each: wider intervals, bounded memory."""


@dataclass(frozen=True)
class Difference:
    """One metric of two adapters.

    Attributes:
        metric: Dotted name; of `norm.*` it is the distance of the ratio from 1 that is compared.
        first: Name of one adapter.
        second: Name of the other.
        difference: Value of the first minus value of the second.
        low: Lower end of the 95% interval of the difference.
        high: Upper end.
        real: The interval leaves 0 out.
        better: Name of the better one, where the difference is real; none for the cosine to the own caption, of which
            neither more nor less is better.
    """

    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    real: bool
    better: str | None


def compare(
    predictions: dict[str, Tensor],
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    resamplings: int = 1000,
    seed: int = 0,
) -> dict:
    """Intervals of every metric of every adapter, and of the difference of every pair of adapters.

    All adapters see the same resamples of the pictures (with all their captions), so that what is hard for all of them
    cancels out of the difference. Intervals are the 2.5% and 97.5% quantiles of the resampled values, moved so that
    their mean is the value of the whole sample. Pairs of a picture with itself are counted once however often a
    resample holds it: distances of resamples are not biased by repeats.

    Args:
        predictions: `(N, D)` of each adapter, by name.
        image: `(N, D)` real image embeddings.
        text: `(N, Dt)` raw text embeddings.
        image_ids: `(N,)` picture of each row.
        resamplings: Of the pictures.
        seed: Of the resamples.

    Returns:
        `{"resamplings", "level": 0.95, "intervals": {adapter: {metric: [low, high]}}, "differences": [...]}` with the
        fields of :class:`Difference`.
    """
    first = first_rows(image_ids)
    _, order = image_ids[first].sort()
    _, picture = image_ids.unique(return_inverse=True)
    first = first[order]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(first), (resamplings, len(first)), generator=generator)
    # The first row of weights is the sample itself.
    weights = torch.ones(resamplings + 1, len(first), dtype=torch.float64)
    weights[1:] = torch.zeros(resamplings, len(first), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    values = {
        name: _values(prediction, image, text, image_ids, first, picture, weights)
        for name, prediction in predictions.items()
    }
    intervals = {
        name: {metric: list(_interval(v)) for metric, v in metrics.items()} for name, metrics in values.items()
    }
    differences = []
    for a, b in combinations(values, 2):
        for metric in values[a]:
            one, other = values[a][metric], values[b][metric]
            if metric.startswith("norm."):
                one, other = (one - 1).abs(), (other - 1).abs()
            low, high = _interval(one - other)
            real = not low <= 0 <= high
            difference = (one - other)[0].item()
            judged = real and metric != "cosine.text"
            better = (a if (difference > 0) == metric.endswith(HIGHER) else b) if judged else None
            differences.append(asdict(Difference(metric, a, b, difference, low, high, real, better)))
    return {"resamplings": resamplings, "level": 0.95, "intervals": intervals, "differences": differences}


def _interval(values: Tensor) -> tuple[float, float]:
    resampled = values[1:]
    quantiles = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=values.dtype))
    low, high = (quantiles - resampled.mean() + values[0]).tolist()
    return low, high


def _values(
    prediction: Tensor, image: Tensor, text: Tensor, ids: Tensor, first: Tensor, picture: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Every metric `(B,)` under every row of weights `(B, P)` of the pictures."""
    pictures = image[first]
    rows = weights[:, picture]
    total = rows.sum(1)

    result: dict[str, Tensor] = {}
    forward = retrieval_ranks(prediction, pictures, ids, ids[first])
    backward = retrieval_ranks(pictures, prediction, ids[first], ids)
    for name, ranks, weight in (("text_to_image", forward, rows), ("image_to_text", backward, weights)):
        for k in (1, 5, 10):
            result[f"{name}.r@{k}"] = _mean(ranks.hits(k), weight)
        result[f"{name}.median_rank"] = _median(ranks.expected(), weight)
    p, y = unit(prediction), unit(pictures)
    gap = rows @ p / total[:, None] - weights @ y / weights.sum(1, keepdim=True)
    result["centroid_gap"] = gap.norm(dim=1)
    result |= _kernel_values(p[first], y, weights)
    result["cosine.paired"] = _mean((p * unit(image)).sum(1), rows)
    if text.shape[1] == prediction.shape[1]:
        result["cosine.text"] = _mean((p * unit(text)).sum(1), rows)
    n, r = prediction.double().norm(dim=1), pictures.double().norm(dim=1)
    predicted, real = _moments(n, rows), _moments(r, weights)
    result["norm.mean_ratio"] = predicted[0] / real[0]
    if (real[1] > 1e-6 * real[0]).all():
        result["norm.std_ratio"] = predicted[1] / real[1]
    return result


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights @ values / weights.sum(1)


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = _mean(values, weights)
    spread = weights @ (values - values.mean()).square() / weights.sum(1) - (mean - values.mean()).square()
    return mean, spread.clamp(min=0).sqrt()


def _median(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted median `(B,)` of `(N,)` values, midway between the two in the middle where there are two."""
    values, order = values.sort()
    reached = weights[:, order].cumsum(1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(1), (reached <= half).sum(1)
    return (values[lower] + values[upper]) / 2


def _kernel_values(p: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
    chosen = torch.linspace(0, len(p) - 1, min(len(p), KERNEL_PICTURES)).long().unique()
    p, y, w = p[chosen].float(), y[chosen].float(), weights[:, chosen].float()
    products = {"pp": p @ p.T, "yy": y @ y.T, "py": p @ y.T}
    cubic = {pair: _quadratic((z + 1).pow(3), w) for pair, z in products.items()}
    within = [off / pairs for off, _, pairs, _ in (cubic["pp"], cubic["yy"])]
    off, diagonal, pairs, singles = cubic["py"]
    result = {"kernel_distance": 1000 * (within[0] + within[1] - 2 * (off + diagonal) / (pairs + singles))}
    gauss = {pair: _quadratic(torch.exp((z - 1) / BANDWIDTH**2), w) for pair, z in products.items()}
    means = {pair: (off + diagonal) / (pairs + singles) for pair, (off, diagonal, pairs, singles) in gauss.items()}
    result["cs_divergence"] = means["pp"].log() + means["yy"].log() - 2 * means["py"].log()
    return result


def _quadratic(kernel: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sums of a kernel off the diagonal and on it, and the weights of both."""
    diagonal = kernel.diagonal()
    off = ((w @ kernel) * w).sum(1) - w.square() @ diagonal
    return off.double(), (w @ diagonal).double(), (w.sum(1) ** 2 - w.square().sum(1)).double(), w.sum(1).double()
