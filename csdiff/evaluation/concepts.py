"""Metrics of meaning, where images carry the name of what they show: groups of embeddings, and what an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.evaluation.distances import unit
from csdiff.evaluation.extras import require

GROUPED_ROWS = 4000


def group_agreement(
    prediction: Tensor, image: Tensor, concepts: Sequence[str], image_concepts: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """Whether predictions and images fall into groups by meaning rather than by modality.

    One KMeans over the unit vectors of both together, with as many clusters as there are concepts, against the
    concepts: V-measure, the harmonic mean of homogeneity (a cluster holds one concept) and completeness (a concept is
    in one cluster), and the adjusted Rand index, 0 by chance and 1 for equal partitions. Compare sets of one size
    only. Of more than 4,000 rows on a side, so many evenly spread ones are grouped.

    Args:
        prediction: `(N, D)`.
        image: `(M, D)`.
        concepts: N names.
        image_concepts: M names.
        seed: Of KMeans.

    Raises:
        CSDiffError: fewer than 2 concepts, or scikit-learn is not installed.

    Source: "Closing the Modality Gap Aligns Group-Wise Semantics", arXiv 2601.18525, section 5.
    """
    require("sklearn", "groups by concept")
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, v_measure_score

    chosen = [torch.linspace(0, len(z) - 1, min(len(z), GROUPED_ROWS)).long().unique() for z in (prediction, image)]
    names = [concepts[i] for i in chosen[0].tolist()] + [image_concepts[i] for i in chosen[1].tolist()]
    rows = torch.cat([unit(z)[rows.to(z.device)] for z, rows in zip((prediction, image), chosen, strict=True)])
    count = len(set(names))
    if count < 2:
        raise CSDiffError(f"Groups by concept need at least 2 different concepts, found {count}.")
    labels = KMeans(count, n_init=2, max_iter=100, random_state=seed).fit(rows.float().cpu().numpy()).labels_
    return {"v_measure": float(v_measure_score(names, labels)), "ari": float(adjusted_rand_score(names, labels))}


@dataclass(frozen=True)
class ConceptRate:
    """Outcome of :func:`concept_rate`; errors are standard errors by bootstrap over the images.

    Attributes:
        rate: Share of the images whose own concept is among the k nearest.
        error: Of the rate.
        originals: The same share of the real images of the same concepts; None where there are none.
        ratio: `rate / originals`.
        ratio_error: Of the ratio; an image and its original are drawn together.
        k: Nearest concepts that count.
        concepts: Concepts there are to choose from.
        count: Images.
    """

    rate: float
    error: float
    originals: float | None
    ratio: float | None
    ratio_error: float | None
    k: int
    concepts: int
    count: int


def concept_rate(
    features: Tensor,
    concepts: Sequence[str],
    reference: Tensor,
    reference_concepts: Sequence[str],
    originals: Tensor | None = None,
    k: int = 10,
    reading: Literal["nearest_image", "mean_of_images"] = "nearest_image",
    resamplings: int = 1000,
    seed: int = 0,
) -> ConceptRate:
    """Whether generated images show what they should: is the right concept among the k nearest concepts?

    Nearness is the cosine similarity of features: of a concept, that of its nearest reference image, or of the mean of
    its images' unit vectors. The judge is as good as its features: take a network that nothing generated the images
    for, and read the ratio to real images of the same concepts.

    ```python
    extractor = load_extractor("efficientnet-lite0")
    rate = concept_rate(extractor(drawn), concepts, extractor(train), train_concepts, extractor(originals))
    ```

    Args:
        features: `(N, D)` of the generated images, from any extractor (`csdiff.evaluation.load_extractor`).
        concepts: N names of what they should show.
        reference: `(M, D)` of real images that stand for their concepts, none of them an original.
        reference_concepts: M names.
        originals: `(N, D)` of the real images that the generated ones stand for.
        k: Nearest concepts that count.
        reading: How near a concept is.
        resamplings: Behind the errors.
        seed: Of the resamples.

    Raises:
        CSDiffError: counts differ, or a concept has no reference image.
    """
    if not len(features) == len(concepts) == len(features if originals is None else originals):
        raise CSDiffError(
            f"concept_rate: expected a concept (and an original) for each of {len(features)} images, found "
            f"{len(concepts)} concepts."
        )
    if unknown := set(concepts) - set(reference_concepts):
        raise CSDiffError(f"concept_rate: expected reference images of every concept, found none of {min(unknown)!r}.")
    hits = _hits(features, concepts, reference, reference_concepts, k, reading)
    real = None if originals is None else _hits(originals, concepts, reference, reference_concepts, k, reading)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(hits), (resamplings, len(hits)), generator=generator)
    rates = hits[drawn].mean(1)
    share = ratio = ratio_error = None
    if real is not None:
        share = real.mean().item()
        ratio = hits.mean().item() / share if share else None
        ratio_error = (rates / real[drawn].mean(1).clamp(min=1 / len(hits))).std().item()
    return ConceptRate(
        hits.mean().item(),
        rates.std().item(),
        share,
        ratio,
        ratio_error,
        k,
        len(set(reference_concepts)),
        len(hits),
    )


def _hits(
    features: Tensor,
    concepts: Sequence[str],
    reference: Tensor,
    reference_concepts: Sequence[str],
    k: int,
    reading: str,
) -> Tensor:
    """`(N,)` 1 where the right concept is among the k nearest, else 0."""
    names = {name: index for index, name in enumerate(sorted(set(reference_concepts)))}
    index = torch.tensor([names[name] for name in reference_concepts])
    wanted = torch.tensor([names[name] for name in concepts])
    x, y = unit(features.cpu()).float(), unit(reference.cpu()).float()
    if reading == "mean_of_images":
        similarity = x @ unit(torch.zeros(len(names), y.shape[1]).index_add_(0, index, y)).float().T
    else:
        similarity = torch.full((len(x), len(names)), -2.0)
        similarity.scatter_reduce_(1, index.expand(len(x), -1), x @ y.T, reduce="amax")
    own = similarity.gather(1, wanted[:, None])
    return ((similarity > own).sum(1) < k).double()
