"""Metrics of predicted image embeddings against the real ones.

Everything takes raw embeddings, rows are samples, and is computed in blocks, so that no N x N matrix is kept.
Directions are compared on the unit sphere; only :func:`norm_ratios` looks at lengths.
"""

import torch
from torch import Tensor

from csdiff.devices import threads
from csdiff.evaluation.distances import (
    centred,
    centroid_gap,
    distribution_gap,
    frechet_distance,
    kernel_distance,
    unit,
)
from csdiff.evaluation.retrieval import first_rows, image_identities, retrieval_ranks

BANDWIDTH = 0.5
"""Kernel width of the reported Cauchy-Schwarz divergence, on unit vectors."""
LIMIT = 5000
"""Rows up to which nothing is estimated."""
_BLOCKS = 5


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


@threads(1)
def effective_rank(x: Tensor) -> float:
    """`exp(H(s / sum s))` of the singular values `s` of the centred unit vectors (Roy and Vetterli 2007).

    Between 1 (collapsed onto a line) and `min(N - 1, D)`; compare with the value of the real embeddings.
    """
    z = centred(unit(x))
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    values = torch.linalg.eigvalsh(gram)
    # Below the rounding of the largest an eigenvalue is noise, whose root would count.
    s = torch.where(values > 1e-14 * values[-1], values, 0).clamp(min=0).sqrt()
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
    limit: int | None = LIMIT,
    seed: int = 0,
) -> dict:
    """Everything above for one set of predictions.

    What grows with the square of the rows is estimated where there are more than `limit`: ranks from so many queries,
    drawn at random, in the whole gallery, and kernels from half as many rows.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; images with several captions repeat.
        text: `(N, Dt)` raw text embeddings, for the cosines to the captions.
        image_ids: `(N,)` image of each row; by default rows with equal image embeddings are one image.
        bandwidth: Kernel width of the Cauchy-Schwarz divergence, on unit vectors.
        limit: See above; None measures on all rows.
        seed: Of what is drawn.

    Returns:
        Nested dict with keys `text_to_image` and `image_to_text` (`r@1`, `r@5`, `r@10`, `median_rank`),
        `centroid_gap`, `distribution_gap`, `frechet_distance`, `kernel_distance` (times 1000), `cs_divergence`,
        `cosine`, `norm`, `effective_rank`, `count`. Distribution metrics compare all predictions with the distinct
        images. Where it estimates, also `estimated` (`queries`, `kernel_rows`) and `errors`, standard errors by key.

    Raises:
        ValueError: if the rows do not match or there are fewer than 2 images.
    """
    if prediction.shape != image.shape:
        raise ValueError(
            f"predictions and images must have one shape, found {tuple(prediction.shape)} and {tuple(image.shape)}"
        )
    ids = (image_identities(image) if image_ids is None else image_ids).to(prediction.device)
    first = first_rows(ids)
    if len(first) < 2:
        raise ValueError(f"metrics need at least 2 different images, found {len(first)}")
    images, numbers = image[first], ids[first]
    generator = torch.Generator().manual_seed(seed)
    # Pairs may stand in any order: both sides are shuffled apart.
    captions, shown = (_draw(count, limit, generator).to(ids.device) for count in (len(ids), len(first)))
    forward = retrieval_ranks(prediction[captions], images, ids[captions], numbers)
    backward = retrieval_ranks(images[shown], prediction, numbers[shown], ids)
    half = None if limit is None or len(ids) <= limit else limit // 2
    kernel = prediction[captions[:half]], images[shown[:half]]
    result = {
        "count": len(prediction),
        "text_to_image": forward.summary(),
        "image_to_text": backward.summary(),
        "centroid_gap": centroid_gap(prediction, images),
        "distribution_gap": distribution_gap(prediction, images),
        "frechet_distance": frechet_distance(prediction, images),
        "kernel_distance": kernel_distance(*kernel),
        "cs_divergence": divergence(*kernel, bandwidth),
        "cosine": cosine_similarities(prediction, image, text, ids),
        "norm": norm_ratios(prediction, images),
        "effective_rank": effective_rank(prediction),
    }
    if half is not None:
        result["estimated"] = {"queries": len(captions), "kernel_rows": half}
        blocks = list(zip(*(z.chunk(_BLOCKS) for z in kernel), strict=False))
        values = {
            "kernel_distance": [kernel_distance(x, y) for x, y in blocks],
            "cs_divergence": [divergence(x, y, bandwidth) for x, y in blocks],
        }
        result["errors"] = {key: torch.tensor(v).std().item() / len(v) ** 0.5 for key, v in values.items()}
        for name, ranks in (("text_to_image", forward), ("image_to_text", backward)):
            for k in (1, 5, 10):
                result["errors"][f"{name}.r@{k}"] = ranks.hits(k).std().item() / len(ranks.nearer) ** 0.5
    return result


def divergence(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Cauchy-Schwarz divergence of unit vectors at one kernel width."""
    from csdiff.losses import cauchy_schwarz_divergence

    return cauchy_schwarz_divergence(unit(x).float(), unit(y).float(), bandwidth=bandwidth).item()


def _draw(count: int, limit: int | None, generator: torch.Generator) -> Tensor:
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:limit]
