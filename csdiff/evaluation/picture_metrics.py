"""Metrics of drawn pictures, from features: of an extractor for FID and KID, of a CLIP model for the rest."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csdiff.evaluation.distances import feature_frechet_distance, frechet_extrapolated
from csdiff.evaluation.extras import require
from csdiff.evaluation.retrieval import first_rows, retrieval

CMMD_BANDWIDTH = 10.0
_BLOCK = 2048


class _Features(nn.Module):
    """Stands for the extractor inside a torchmetrics metric that is given features."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(drawn: Tensor, real: Tensor) -> float:
    """Frechet distance of features `(N, D)` and `(M, D)`, by torchmetrics (Heusel et al. 2017); biased upwards."""
    require("torchmetrics", "FID")
    from torchmetrics.image.fid import FrechetInceptionDistance

    return _compute(FrechetInceptionDistance(feature=_Features(drawn.shape[1])), drawn, real).item()


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
        metric = KernelInceptionDistance(feature=_Features(drawn.shape[1]), subset_size=size, subsets=subsets)
        mean, spread = _compute(metric, drawn, real)
    return 1000 * mean.item(), 1000 * spread.item()


def _compute(metric, drawn: Tensor, real: Tensor):
    metric.update(real.float(), real=True)
    metric.update(drawn.float(), real=False)
    return metric.compute()


def cmmd(drawn: Tensor, real: Tensor, bandwidth: float = CMMD_BANDWIDTH) -> float:
    """CMMD (Jayasumana et al. 2024): unbiased MMD^2 of unit CLIP embeddings, times 1000.

    The kernel is `exp(-|x-y|^2 / (2 bandwidth^2))`; with the published width of 10, on vectors of norm 1, it sees
    little but the means.

    Args:
        drawn: `(N, D)` CLIP image embeddings, N >= 2.
        real: `(M, D)`, M >= 2.
        bandwidth: Of the kernel.
    """
    x, y = (F.normalize(z.double(), dim=-1) for z in (drawn, real))

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(torch.exp((rows @ b.T - 1) / bandwidth**2).sum() for rows in a.split(_BLOCK))

    n, m = len(x), len(y)
    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return 1000 * (within - 2 * total(x, y) / (n * m)).item()


def clip_score(picture: Tensor, text: Tensor) -> float:
    """`100 max(0, cos)` of CLIP embeddings of pictures and of their prompts, on average (Hessel et al. 2021)."""
    return 100 * F.cosine_similarity(picture.double(), text.double()).clamp(min=0).mean().item()


def diversity(picture: Tensor, prompt_ids: Tensor) -> float | None:
    """Mean of `1 - cos` over pairs of pictures of one prompt; None where no prompt has two."""
    z = F.normalize(picture.double(), dim=-1)
    _, group, sizes = prompt_ids.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), z.shape[1], dtype=z.dtype).index_add_(0, group, z)
    several = sizes > 1
    if not several.any():
        return None
    pairs = (sizes * (sizes - 1))[several]
    return (1 - (sums.square().sum(1) - sizes)[several] / pairs).mean().item()


def picture_metrics(
    features: dict[str, Tensor],
    real_features: dict[str, Tensor],
    clip: Tensor,
    real_clip: Tensor,
    prompts: Tensor,
    prompt_ids: Tensor,
    seed: int = 0,
) -> dict:
    """All metrics of one set of pictures.

    Args:
        features: `(N, D)` of the drawn pictures by extractor.
        real_features: `(M, D)` of the reference pictures by extractor.
        clip: `(N, Dc)` CLIP image embeddings of the drawn pictures.
        real_clip: `(M, Dc)` of the reference pictures.
        prompts: `(N, Dc)` CLIP text embeddings of their prompts; pictures of one prompt repeat it.
        prompt_ids: `(N,)` prompt of each picture.
        seed: Of the subsets.

    Returns:
        `{"count", "spaces": {extractor: {"fid", "fid_extrapolated", "kid", "kid_std"}}, "cmmd", "clip_score",
        "picture_to_prompt": {"r@1", ...}, "diversity"}`.
    """
    spaces = {}
    for name, drawn in features.items():
        real = real_features[name]
        mean, spread = kid(drawn, real, seed=seed)
        extrapolated = frechet_extrapolated(drawn, real, seed=seed, distance=feature_frechet_distance)
        spaces[name] = {"fid": fid(drawn, real), "fid_extrapolated": extrapolated, "kid": mean, "kid_std": spread}
    first = first_rows(prompt_ids)
    return {
        "count": len(clip),
        "spaces": spaces,
        "cmmd": cmmd(clip, real_clip),
        "clip_score": clip_score(clip, prompts),
        "picture_to_prompt": retrieval(clip, prompts[first], prompt_ids, prompt_ids[first]),
        "diversity": diversity(clip, prompt_ids),
    }
