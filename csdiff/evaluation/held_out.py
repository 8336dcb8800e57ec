"""The full set of metrics of `csdiff evaluate`: those of training validation, and those that cost more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.evaluation.distances import frechet_distance, frechet_extrapolated, mmd_test, unit
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.retrieval import first_rows, image_identities

BANDWIDTHS = (0.25, 0.35, 0.5, 1.0)
"""Kernel widths at which the Cauchy-Schwarz divergence is reported."""
MIN_PICTURES = 8
"""Halves of halves are compared: with fewer pictures nothing of it means anything."""


def linear_separability(x: Tensor, y: Tensor, limit: int = 2000) -> float:
    """How well a linear classifier tells two sets apart on rows it was not fitted to: 0.5 not at all, 1 always.

    Logistic regression on standardised unit vectors, fitted to the even rows and tested on the odd ones and the other
    way round; the mean accuracy, both classes weighted alike. Row i of both sets may belong to one picture: it is then
    on one side of the split with both.

    Args:
        x: `(N, D)`, N >= 4.
        y: `(M, D)`, M >= 4.
        limit: Rows used of each set, the first ones.

    Raises:
        CSDiffError: scikit-learn is not installed.
    """
    require_classifier()
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
) -> dict:
    """All metrics of one set of predictions.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; pictures with several captions repeat.
        text: `(N, Dt)` raw text embeddings.
        image_ids: `(N,)` picture of each row; by default rows with equal image embeddings are one picture.
        bandwidths: Kernel widths of the Cauchy-Schwarz divergence, on unit vectors.
        seed: Of the random halves.

    Returns:
        The dict of :func:`embedding_metrics`, and `cs_divergence_at` (by bandwidth), `mmd` (`squared`, `bandwidth`,
        `p_value`), `separability`, `frechet_halves` (predictions of one half of the pictures against the other half,
        the size of `baselines.real`), `frechet_extrapolated`.

    Raises:
        CSDiffError: fewer than 8 pictures.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    rows = first_rows(ids)
    require_pictures(len(rows))
    result = embedding_metrics(prediction, image, text, ids)
    result["cs_divergence_at"] = _divergences(prediction, image[rows], bandwidths)
    shuffled = rows[_shuffle(len(rows), seed).to(rows.device)]
    left, right = shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]
    result["mmd"] = vars(mmd_test(prediction[left], image[right], seed=seed))
    result["separability"] = linear_separability(prediction[shuffled], image[shuffled])
    result["frechet_halves"] = frechet_distance(prediction[left], image[right])
    result["frechet_extrapolated"] = frechet_extrapolated(prediction[rows], image[rows], seed=seed)
    return result


def real_metrics(
    image: Tensor, image_ids: Tensor | None = None, bandwidths: Sequence[float] = BANDWIDTHS, seed: int = 0
) -> dict:
    """One random half of the real pictures against the other: what independent pictures of the same kind would get.

    Half as many rows raise every distance but the unbiased kernel distance, and lower the effective rank.

    Args:
        image: `(N, D)` real image embeddings; repeated pictures count once.
        image_ids: `(N,)` picture of each row.
        bandwidths: Kernel widths of the Cauchy-Schwarz divergence.
        seed: Of the halves, the same as in :func:`held_out_metrics`.

    Returns:
        The metrics of :func:`held_out_metrics` that compare distributions; retrieval and cosines to captions have no
        meaning between different pictures.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    rows = first_rows(ids)
    require_pictures(len(rows))
    shuffled = rows[_shuffle(len(rows), seed).to(rows.device)]
    left, right = image[shuffled[: len(rows) // 2]], image[shuffled[len(rows) // 2 :]]
    right = right[: len(left)]
    result = embedding_metrics(left, right)
    for name in ("text_to_image", "image_to_text", "cosine"):
        del result[name]
    return {
        **result,
        "cs_divergence_at": _divergences(left, right, bandwidths),
        "mmd": vars(mmd_test(left, right, seed=seed)),
        "separability": linear_separability(left, right),
        "frechet_halves": result["frechet_distance"],
        "frechet_extrapolated": frechet_extrapolated(left, right, seed=seed),
    }


def require_classifier() -> None:
    """Raises a CSDiffError where scikit-learn, which tells separability, is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CSDiffError("linear separability needs scikit-learn; pip install 'csdiff[eval]'.") from error


def require_pictures(count: int) -> None:
    """Raises a CSDiffError where there are too few pictures to measure anything."""
    if count < MIN_PICTURES:
        raise CSDiffError(
            f"Expected at least {MIN_PICTURES} different pictures to evaluate on, found {count}; give more data."
        )


def _divergences(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> dict[str, float]:
    from csdiff.losses import cauchy_schwarz_divergence

    x, y = unit(x).float(), unit(y).float()
    return {str(width): cauchy_schwarz_divergence(x, y, bandwidth=width).item() for width in bandwidths}


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
