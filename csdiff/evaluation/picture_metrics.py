"""Metrics of drawn pictures, from features of an extractor (FID, KID, concepts) or of a CLIP model (the rest)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csdiff.errors import CSDiffError, require
from csdiff.evaluation.distances import feature_frechet_distance, frechet_extrapolated, unbiased_mmd, unit
from csdiff.evaluation.retrieval import first_rows, retrieval_ranks


def fid(drawn: Tensor, real: Tensor) -> float:
    """Frechet distance of features `(N, D)` and `(M, D)`, by torchmetrics (Heusel et al. 2017); biased upwards."""
    require("torchmetrics", "FID")
    from torchmetrics.image.fid import FrechetInceptionDistance

    return _compute(FrechetInceptionDistance, drawn, real).item()


def kid(drawn: Tensor, real: Tensor, subset_size: int = 500, subsets: int = 50, seed: int = 0) -> tuple[float, float]:
    """Kernel distance of features times 1000, mean and standard deviation over subsets, by torchmetrics.

    Unbiased MMD^2 under `(x.y / D + 1)^3` (Binkowski et al. 2018).
    """
    require("torchmetrics", "KID")
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(drawn), len(real))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        mean, spread = _compute(KernelInceptionDistance, drawn, real, subset_size=size, subsets=subsets)
    return 1000 * mean.item(), 1000 * spread.item()


def _compute(kind: type, drawn: Tensor, real: Tensor, **options):
    network = nn.Identity()  # The metric is given the features.
    network.num_features = drawn.shape[1]
    metric = kind(feature=network, **options)
    metric.update(real.float(), real=True)
    metric.update(drawn.float(), real=False)
    return metric.compute()


def cmmd(drawn: Tensor, real: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): unbiased MMD^2 of unit CLIP embeddings, times 1000.

    The kernel is `exp(-|x-y|^2 / (2 * 10^2))`, which on vectors of norm 1 sees little but the means.
    """
    return 1000 * unbiased_mmd(drawn, real, lambda products: torch.exp((products - 1) / 100))


def clip_score(picture: Tensor, text: Tensor) -> float:
    """`100 max(0, cos)` of CLIP embeddings of pictures and of their prompts, on average (Hessel et al. 2021)."""
    return 100 * F.cosine_similarity(picture.double(), text.double()).clamp(min=0).mean().item()


def diversity(picture: Tensor, prompt_ids: Tensor) -> float | None:
    """Mean of `1 - cos` over pairs of pictures of one prompt; None where no prompt has two."""
    z = unit(picture)
    _, group, sizes = prompt_ids.unique(return_inverse=True, return_counts=True)
    sums = z.new_zeros(len(sizes), z.shape[1]).index_add_(0, group, z)
    several = sizes > 1
    if not several.any():
        return None
    pairs = (sizes * (sizes - 1))[several]
    return (1 - (sums.square().sum(1) - sizes)[several] / pairs).mean().item()


def space_metrics(drawn: Tensor, real: Tensor, seed: int = 0) -> dict[str, float]:
    """`fid`, `fid_extrapolated`, `kid` and `kid_std` of features `(N, D)` and `(M, D)` of one extractor."""
    mean, spread = kid(drawn, real, seed=seed)
    extrapolated = frechet_extrapolated(drawn, real, seed=seed, distance=feature_frechet_distance)
    return {"fid": fid(drawn, real), "fid_extrapolated": extrapolated, "kid": mean, "kid_std": spread}


def prompt_metrics(picture: Tensor, prompts: Tensor, prompt_ids: Tensor) -> dict:
    """`clip_score`, `picture_to_prompt` (`r@1`, ...) and `diversity`.

    Of CLIP embeddings `(N, Dc)` of pictures and of their prompts, which pictures of one prompt repeat; `prompt_ids`
    `(N,)` tells these.
    """
    first = first_rows(prompt_ids)
    return {
        "clip_score": clip_score(picture, prompts),
        "picture_to_prompt": retrieval_ranks(picture, prompts[first], prompt_ids, prompt_ids[first]).summary(),
        "diversity": diversity(picture, prompt_ids),
    }


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
    k: int
    concepts: int
    """Concepts there are to choose from."""
    count: int


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
