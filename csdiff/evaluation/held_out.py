"""The full set of metrics of `csdiff evaluate`: those of training validation, and those that cost more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.evaluation.concepts import group_agreement
from csdiff.evaluation.distances import frechet_distance, frechet_extrapolated, mmd_test, unit
from csdiff.evaluation.embedding_metrics import LIMIT, divergence, embedding_metrics
from csdiff.evaluation.extras import require
from csdiff.evaluation.retrieval import first_rows, image_identities

BANDWIDTHS = (0.25, 0.35, 0.5, 1.0)
"""Kernel widths at which the Cauchy-Schwarz divergence is reported."""
MIN_IMAGES = 8
"""Halves of halves are compared: with fewer images nothing of it means anything."""


def linear_separability(x: Tensor, y: Tensor, limit: int = 2000) -> float:
    """How well a linear classifier tells two sets apart on rows it was not fitted to: 0.5 not at all, 1 always.

    Logistic regression on standardised unit vectors, fitted to the even rows and tested on the odd ones and the other
    way round; the mean accuracy, both classes weighted alike. Row i of both sets may belong to one image: it is then
    on one side of the split with both.

    Args:
        x: `(N, D)`, N >= 4.
        y: `(M, D)`, M >= 4.
        limit: Rows used of each set, the first ones.

    Raises:
        CSDiffError: scikit-learn is not installed.
    """
    require("sklearn", "linear separability")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = (unit(z)[:limit].cpu().numpy() for z in (x, y))
    accuracies = []
    for fitted in (0, 1):
        train = [z[fitted::2] for z in (x, y)]
        test = [z[1 - fitted :: 2] for z in (x, y)]
        labels = [[0] * len(a) + [1] * len(b) for a, b in (train, test)]
        rows = [torch.cat([torch.from_numpy(z) for z in part]).numpy() for part in (train, test)]
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, class_weight="balanced"))
        accuracies.append(balanced_accuracy_score(labels[1], classifier.fit(rows[0], labels[0]).predict(rows[1])))
    return float(sum(accuracies) / 2)


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
    """All metrics of one set of predictions.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; images with several captions repeat.
        text: `(N, Dt)` raw text embeddings.
        image_ids: `(N,)` image of each row; by default rows with equal image embeddings are one image.
        bandwidths: Kernel widths of the Cauchy-Schwarz divergence, on unit vectors.
        seed: Of the random halves, and of what is drawn.
        limit: Rows above which some are estimated, see :func:`embedding_metrics`.
        concepts: N names of what the images show, for the groups.

    Returns:
        The dict of :func:`embedding_metrics`, and `cs_divergence_at` (by bandwidth), `mmd` (`squared`, `bandwidth`,
        `p_value`), `separability`, `frechet_halves` (predictions of one half of the images against the other half,
        the size of `baselines.real`), `frechet_extrapolated`; with `concepts`, `groups` (`v_measure`, `ari`).

    Raises:
        CSDiffError: fewer than 8 images.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    rows = first_rows(ids)
    require_images(len(rows))
    result = embedding_metrics(prediction, image, text, ids, limit=limit, seed=seed)
    shuffled = rows[_shuffle(len(rows), seed).to(rows.device)]
    left, right = shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]
    result |= _distributions(prediction[rows], image[rows], bandwidths, seed, limit)
    result["mmd"] = vars(mmd_test(prediction[left], image[right], seed=seed))
    result["separability"] = linear_separability(prediction[shuffled], image[shuffled])
    result["frechet_halves"] = frechet_distance(prediction[left], image[right])
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

    Half as many rows raise every distance but the unbiased kernel distance, and lower the effective rank.

    Args:
        image: `(N, D)` real image embeddings; repeated images count once.
        image_ids: `(N,)` image of each row.
        bandwidths: Kernel widths of the Cauchy-Schwarz divergence.
        seed: Of the halves, the same as in :func:`held_out_metrics`.
        limit: As there.

    Returns:
        The metrics of :func:`held_out_metrics` that compare distributions; retrieval and cosines to captions have no
        meaning between different images.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    rows = first_rows(ids)
    require_images(len(rows))
    shuffled = rows[_shuffle(len(rows), seed).to(rows.device)]
    left, right = image[shuffled[: len(rows) // 2]], image[shuffled[len(rows) // 2 :]]
    right = right[: len(left)]
    result = embedding_metrics(left, right, limit=limit, seed=seed)
    for name in ("text_to_image", "image_to_text", "cosine"):
        del result[name]
    if "errors" in result:
        result["errors"] = {key: error for key, error in result["errors"].items() if ".r@" not in key}
    return {
        **result,
        **_distributions(left, right, bandwidths, seed, limit),
        "mmd": vars(mmd_test(left, right, seed=seed)),
        "separability": linear_separability(left, right),
        "frechet_halves": result["frechet_distance"],
    }


def _distributions(x: Tensor, y: Tensor, bandwidths: Sequence[float], seed: int, limit: int | None) -> dict:
    a, b = x, y
    if limit is not None and len(x) > limit:
        a, b = (z[_shuffle(len(z), seed + place)[: limit // 2].to(z.device)] for place, z in enumerate((x, y)))
    return {
        "cs_divergence_at": {str(width): divergence(a, b, width) for width in bandwidths},
        "frechet_extrapolated": frechet_extrapolated(x, y, seed=seed),
    }


def require_images(count: int) -> None:
    """Raises a CSDiffError where there are too few images to measure anything."""
    if count < MIN_IMAGES:
        raise CSDiffError(
            f"Expected at least {MIN_IMAGES} different images to evaluate on, found {count}; give more data."
        )


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
