"""Metrics of drawn pictures, from features: of an extractor for FID and KID, of a CLIP model for the rest."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csdiff.evaluation.distances import feature_frechet_distance, frechet_extrapolated, unbiased_mmd, unit
from csdiff.evaluation.extras import require
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
    given = nn.Identity()  # Stands for the network: the metric is given its features.
    given.num_features = drawn.shape[1]
    metric = kind(feature=given, **options)
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
