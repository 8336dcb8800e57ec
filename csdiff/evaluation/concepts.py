"""Metrics of meaning, where images carry the name of what they show: groups of embeddings, and what an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ConceptRate:
    """Outcome of :func:`concept_rate`; errors are standard errors by bootstrap over the images."""

    rate: float
    """Share of the images whose own concept is among the k nearest."""
    error: float
    originals: float | None
    """The same share of the real images of the same concepts; None where there are none."""
    ratio: float | None
    """`rate / originals`."""
    ratio_error: float | None
    """An image and its original are drawn together."""
    k: int
    concepts: int
    """Concepts there are to choose from."""
    count: int
    """Images."""


def concept_rate(
    features: Tensor,
    concepts: Sequence[str],
    reference: Tensor,
    reference_concepts: Sequence[str],
    originals: Tensor | None = None,
    k: int = 10,
    resamplings: int = 1000,
    seed: int = 0,
) -> ConceptRate:
    """Whether generated images show what they should: is the right concept among the k nearest concepts?

    A concept is as near as its nearest reference image, by the cosine similarity of features. The judge is as good as
    its features: take a network that nothing generated the images for, and read the ratio to real images of the same
    concepts.

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
    number = {name: index for index, name in enumerate(sorted(set(reference_concepts)))}
    shown = torch.tensor([number[name] for name in reference_concepts])
    wanted = torch.tensor([number[name] for name in concepts])
    reference = unit(reference.cpu()).float()

    def hits(z: Tensor) -> Tensor:
        """`(N,)` 1 where the right concept is among the k nearest, else 0."""
        similarity = torch.full((len(z), len(number)), -2.0)
        products = unit(z.cpu()).float() @ reference.T
        similarity.scatter_reduce_(1, shown.expand(len(z), -1), products, reduce="amax")
        own = similarity.gather(1, wanted[:, None])
        return ((similarity > own).sum(1) < k).double()

    found = hits(features)
    rate = found.mean().item()
    drawn = torch.randint(len(found), (resamplings, len(found)), generator=torch.Generator().manual_seed(seed))
    rates = found[drawn].mean(1)
    share = ratio = ratio_error = None
    if originals is not None:
        real = hits(originals)
        share = real.mean().item()
        ratio = rate / share if share else None
        ratio_error = (rates / real[drawn].mean(1).clamp(min=1 / len(found))).std().item()
    return ConceptRate(rate, rates.std().item(), share, ratio, ratio_error, k, len(number), len(found))
