"""Metrics of predicted image embeddings against the real ones: those of validation, and those that cost more.

Everything takes raw embeddings, rows are samples, and is computed in blocks, so that no N x N matrix is kept.
Directions are compared on the unit sphere; only :func:`norm_ratios` looks at lengths.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csdiff.devices import threads
from csdiff.errors import CSDiffError, require
from csdiff.evaluation.distances import (
    centred,
    centroid_gap,
    distribution_gap,
    frechet_distance,
    frechet_extrapolated,
    kernel_distance,
    mmd_test,
    unit,
)
from csdiff.evaluation.retrieval import RECALLS, first_rows, image_identities, retrieval_ranks
from csdiff.losses import cauchy_schwarz_divergence

BANDWIDTH = 0.5
"""Kernel width of the reported Cauchy-Schwarz divergence, on unit vectors."""
BANDWIDTHS = (0.25, 0.35, 0.5, 1.0)
"""Kernel widths at which `csdiff evaluate` reports it beside."""
LIMIT = 5000
"""Rows up to which nothing is estimated."""
GROUPED_ROWS = 4000
_BLOCKS = 5


def cosine_similarities(
    prediction: Tensor, image: Tensor, text: Tensor | None, image_ids: Tensor
) -> dict[str, float | None]:
    """Mean cosine of a prediction to its true image, to its own caption, and to unrelated captions.

    `paired` is high when the prediction lands near its picture; `text` and `unpaired` compare with raw text embeddings
    (own caption; mean over all captions of other pictures) and are None where text has another dimension. Arguments
    are those of :func:`embedding_metrics`.
    """
    p = unit(prediction)
    result = {"paired": (p * unit(image)).sum(1).mean().item(), "unpaired": None, "text": None}
    if text is None or text.shape[1] != p.shape[1]:
        return result
    t = unit(text)
    result["text"] = (p * t).sum(1).mean().item()
    _, group, sizes = image_ids.to(p.device).unique(return_inverse=True, return_counts=True)
    sums = [z.new_zeros(len(sizes), z.shape[1]).index_add_(0, group, z) for z in (p, t)]
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


def linear_separability(x: Tensor, y: Tensor) -> float:
    """How well a linear classifier tells two sets apart on rows it was not fitted to: 0.5 not at all, 1 always.

    Logistic regression on standardised unit vectors, fitted to the even rows and tested on the odd ones and the other
    way round; the mean accuracy, both classes weighted alike. Row i of both sets may belong to one image: it is then
    on one side of the split with both. Of each set, `(N, D)` and `(M, D)`, the first 2,000 rows are used.

    Raises:
        CSDiffError: scikit-learn is not installed.
    """
    require("sklearn", "linear separability")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = [unit(z)[:2000].cpu().numpy() for z in (x, y)]
    labels = np.repeat([0, 1], [len(z) for z in sets])
    halves = PredefinedSplit(np.concatenate([np.arange(len(z)) % 2 for z in sets]))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, class_weight="balanced"))
    scores = cross_val_score(classifier, np.concatenate(sets), labels, scoring="balanced_accuracy", cv=halves)
    return float(scores.mean())


def group_agreement(
    prediction: Tensor, image: Tensor, concepts: Sequence[str], image_concepts: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """Whether predictions and images fall into groups by meaning rather than by modality.

    One KMeans over the unit vectors of both together, with as many clusters as there are concepts, against the
    concepts: V-measure, the harmonic mean of homogeneity (a cluster holds one concept) and completeness (a concept is
    in one cluster), and the adjusted Rand index, 0 by chance and 1 for equal partitions. Compare sets of one size
    only. Of more than 4,000 rows on a side, so many evenly spread ones are grouped. Predictions are `(N, D)` with N
    names of concepts, images `(M, D)` with M.

    Raises:
        CSDiffError: fewer than 2 concepts, or scikit-learn is not installed.

    Source: "Closing the Modality Gap Aligns Group-Wise Semantics", arXiv 2601.18525, section 5.
    """
    require("sklearn", "groups by concept")
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, v_measure_score

    parts, names = [], []
    for z, known in ((prediction, concepts), (image, image_concepts)):
        rows = torch.linspace(0, len(z) - 1, min(len(z), GROUPED_ROWS)).long().unique()
        parts.append(unit(z)[rows.to(z.device)].float().cpu())
        names += [known[row] for row in rows.tolist()]
    count = len(set(names))
    if count < 2:
        raise CSDiffError(f"Groups by concept need at least 2 different concepts, found {count}.")
    labels = KMeans(count, n_init=2, max_iter=100, random_state=seed).fit(torch.cat(parts).numpy()).labels_
    return {"v_measure": float(v_measure_score(names, labels)), "ari": float(adjusted_rand_score(names, labels))}


def divergence(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Cauchy-Schwarz divergence of unit vectors at one kernel width."""
    return cauchy_schwarz_divergence(unit(x).float(), unit(y).float(), bandwidth=bandwidth).item()


def embedding_metrics(
    prediction: Tensor,
    image: Tensor,
    text: Tensor | None = None,
    image_ids: Tensor | None = None,
    limit: int | None = LIMIT,
    seed: int = 0,
) -> dict:
    """The metrics of training's validation, of one set of predictions.

    What grows with the square of the rows is estimated where there are more than `limit`: ranks from so many queries,
    drawn at random, in the whole gallery, and kernels from half as many rows.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; images with several captions repeat.
        text: `(N, Dt)` raw text embeddings, for the cosines to the captions.
        image_ids: `(N,)` image of each row; by default rows with equal image embeddings are one image.
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
    estimates = limit is not None and len(ids) > limit
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        drawn = torch.arange(count) if limit is None or count <= limit else torch.randperm(count, generator=generator)
        return drawn[:limit].to(ids.device)

    # Pairs may stand in any order: both sides are shuffled apart.
    captions, shown = draw(len(ids)), draw(len(first))
    ranks = {
        "text_to_image": retrieval_ranks(prediction[captions], images, ids[captions], numbers),
        "image_to_text": retrieval_ranks(images[shown], prediction, numbers[shown], ids),
    }
    half = limit // 2 if estimates else None
    kernel = prediction[captions[:half]], images[shown[:half]]
    result = {
        "count": len(prediction),
        **{name: found.summary() for name, found in ranks.items()},
        "centroid_gap": centroid_gap(prediction, images),
        "distribution_gap": distribution_gap(prediction, images),
        "frechet_distance": frechet_distance(prediction, images),
        "kernel_distance": kernel_distance(*kernel),
        "cs_divergence": divergence(*kernel, BANDWIDTH),
        "cosine": cosine_similarities(prediction, image, text, ids),
        "norm": norm_ratios(prediction, images),
        "effective_rank": effective_rank(prediction),
    }
    if estimates:
        blocks = list(zip(*(z.chunk(_BLOCKS) for z in kernel), strict=False))
        samples = {
            "kernel_distance": torch.tensor([kernel_distance(x, y) for x, y in blocks]),
            "cs_divergence": torch.tensor([divergence(x, y, BANDWIDTH) for x, y in blocks]),
            **{f"{name}.r@{k}": found.hits(k) for name, found in ranks.items() for k in RECALLS},
        }
        result["estimated"] = {"queries": len(captions), "kernel_rows": half}
        result["errors"] = {key: sample.std().item() / len(sample) ** 0.5 for key, sample in samples.items()}
    return result


def held_out_metrics(
    prediction: Tensor,
    image: Tensor,
    text: Tensor | None = None,
    image_ids: Tensor | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
    limit: int | None = LIMIT,
    concepts: Sequence[str] | None = None,
) -> dict:
    """All metrics of one set of predictions; a CSDiffError of fewer than 8 images.

    Those of :func:`embedding_metrics`, and `cs_divergence_at` (by bandwidth, on unit vectors), `mmd` (`squared`,
    `bandwidth`, `p_value`), `separability`, `frechet_halves` (predictions of one half of the images against the other
    half, the size of `baselines.real`), `frechet_extrapolated`; with N `concepts`, names of what the images show,
    `groups` (`v_measure`, `ari`).
    """
    ids = image_identities(image) if image_ids is None else image_ids
    rows = first_rows(ids)
    left, right = _halves(rows, seed)
    both = torch.cat([left, right])
    pairs = [(prediction[one], image[other]) for one, other in ((rows, rows), (both, both), (left, right))]
    result = {
        **embedding_metrics(prediction, image, text, ids, limit=limit, seed=seed),
        **_distributions(*pairs, bandwidths, seed, limit),
    }
    if concepts is not None and len(set(concepts)) > 1:
        names = [concepts[row] for row in rows.tolist()]
        result["groups"] = group_agreement(prediction, image[rows], concepts, names, seed)
    return result


def real_metrics(
    image: Tensor,
    image_ids: Tensor | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
    limit: int | None = LIMIT,
) -> dict:
    """One random half of the real images against the other: what independent images of the same kind would get.

    Metrics are those of :func:`held_out_metrics`, without the metrics of pairs (retrieval, cosines).
    Half as many rows raise every distance but the unbiased kernel distance, and lower the effective rank.
    """
    left, right = _halves(first_rows(image_identities(image) if image_ids is None else image_ids), seed)
    pair = image[left], image[right[: len(left)]]
    result = embedding_metrics(*pair, limit=limit, seed=seed)
    for key in ("text_to_image", "image_to_text", "cosine"):
        del result[key]
    if "errors" in result:
        result["errors"] = {key: error for key, error in result["errors"].items() if key in result}
    return {**result, **_distributions(pair, pair, pair, bandwidths, seed, limit)}


def _halves(rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of the rows of different images."""
    require_images(len(rows))
    return rows[_shuffle(len(rows), seed)].tensor_split([len(rows) // 2])


def _distributions(rows, shuffled, halves, bandwidths: Sequence[float], seed: int, limit: int | None) -> dict:
    """Metrics of pairs of sets: all rows, the same in random order, and one half against the other half."""
    drawn = rows
    if limit is not None and len(rows[0]) > limit:
        drawn = [z[_shuffle(len(z), seed + place)[: limit // 2]] for place, z in enumerate(rows)]
    return {
        "cs_divergence_at": {str(width): divergence(*drawn, width) for width in bandwidths},
        "frechet_extrapolated": frechet_extrapolated(*rows, seed=seed),
        "mmd": mmd_test(*halves, seed=seed)._asdict(),
        "separability": linear_separability(*shuffled),
        "frechet_halves": frechet_distance(*halves),
    }


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def require_images(count: int) -> None:
    """Raises a CSDiffError where there are too few images: halves of halves are compared."""
    if count < 8:
        raise CSDiffError(f"Expected at least 8 different images to evaluate on, found {count}; give more data.")
