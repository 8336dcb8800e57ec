"""Distances between two sets of embeddings, on the unit sphere: rows are samples, sets may differ in size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csdiff.devices import threads

_BLOCK = 2048


def unit(z: Tensor) -> Tensor:
    """Rows over their norms, in float64."""
    return F.normalize(z.detach().double(), dim=-1)


def centroid_gap(x: Tensor, y: Tensor) -> float:
    """Distance of the centroids of the unit vectors, `||mean(x/|x|) - mean(y/|y|)||`, in [0, 2]."""
    return (unit(x).mean(0) - unit(y).mean(0)).norm().item()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians fitted to the unit vectors, `|m1-m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    It is biased upwards on small samples: print real against real beside it, or see :func:`frechet_extrapolated`.

    Args:
        x: `(N, D)`, N >= 2.
        y: `(M, D)`, M >= 2.
    """
    return feature_frechet_distance(unit(x), unit(y))


def feature_frechet_distance(x: Tensor, y: Tensor) -> float:
    """As :func:`frechet_distance` of the rows as they are, not normalised: FID, given features of pictures."""
    x, y = x.double(), y.double()
    return (x.mean(0) - y.mean(0)).square().sum().item() + _centred_frechet(x, y)


def distribution_gap(x: Tensor, y: Tensor) -> float:
    """The Frechet distance that is left after centring both sets: `Tr(S1 + S2 - 2 (S1 S2)^(1/2))` of unit vectors."""
    return _centred_frechet(unit(x), unit(y))


@threads(1)
def _centred_frechet(x: Tensor, y: Tensor) -> float:
    """`Tr(S1 S2)^(1/2)` is the sum of the square roots of the eigenvalues of `A S2 A^T` for `S1 = A^T A`.

    A symmetric matrix no larger than either set or than D: far cheaper than singular values, and stable where the
    covariances are singular, as they are with fewer samples than dimensions.
    """
    x, y = sorted((centred(z) for z in (x, y)), key=len)
    a = torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x
    cross = a @ (y.T @ y) @ a.T if len(y) > y.shape[1] else (a @ y.T) @ (a @ y.T).T
    roots = torch.linalg.eigvalsh(cross).clamp(min=0).sqrt().sum()
    return max((x.square().sum() + y.square().sum() - 2 * roots).item(), 0.0)


def centred(z: Tensor) -> Tensor:
    """`(N, D)` matrix Z with `Z^T Z` the covariance of the rows."""
    if len(z) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, found {len(z)}")
    return (z - z.mean(0)) / (len(z) - 1) ** 0.5


def frechet_extrapolated(
    x: Tensor,
    y: Tensor,
    sizes: int = 6,
    seed: int = 0,
    distance: Callable[[Tensor, Tensor], float] = frechet_distance,
) -> float:
    """Frechet distance for infinitely many samples: the intercept of a line in 1/n (Chong and Forsyth 2020).

    The bias of the Frechet distance falls as 1/n. It is measured on random subsets of n rows of both sets, n from a
    fifth of the rows to all of them, evenly in 1/n, and the fitted line is read at 1/n = 0. The line is only straight
    when n is well above D: with fewer rows than a few times D the result is still too high, or below zero. Real
    against real shows how far off it is.

    Args:
        x: `(N, D)`.
        y: `(M, D)`.
        sizes: Subset sizes.
        seed: Of the subsets.
        distance: What is extrapolated; `feature_frechet_distance` for features of pictures.
    """
    count = min(len(x), len(y))
    inverse = torch.linspace(1 / count, 5 / count, sizes, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # x and y are drawn apart: rows of one picture on both sides would hide part of the bias.
    values = [
        distance(*(z[torch.randperm(len(z), generator=generator)[:n].to(z.device)] for z in (x, y)))
        for n in (1 / inverse).round().long().clamp(min=2).tolist()
    ]
    line = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    return torch.linalg.lstsq(line, torch.tensor(values, dtype=torch.float64)[:, None]).solution[0].item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of unit vectors under the polynomial kernel `(x.y + 1)^3`, times 1000 (Binkowski et al. 2018).

    Zero in expectation for two samples of one distribution, whatever their size; slightly negative values are noise.

    Args:
        x: `(N, D)`, N >= 2.
        y: `(M, D)`, M >= 2.
    """
    x, y = unit(x), unit(y)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"kernel_distance needs at least 2 rows in each set, found {n} and {m}")
    within_x = (_kernel_sum(x, x) - ((x * x).sum(1) + 1).pow(3).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - ((y * y).sum(1) + 1).pow(3).sum()) / (m * (m - 1))
    return 1000 * (within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)).item()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return sum((rows @ y.T + 1).pow(3).sum() for rows in x.split(_BLOCK))


@dataclass(frozen=True)
class TwoSampleTest:
    """Outcome of :func:`mmd_test`.

    Attributes:
        squared: Unbiased MMD^2 under the Gaussian kernel.
        bandwidth: Width of the kernel, `exp(-|x-y|^2 / (2 bandwidth^2))`.
        p_value: Part of the permutations with an MMD^2 as large; small means two different distributions.
    """

    squared: float
    bandwidth: float
    p_value: float


def mmd_test(
    x: Tensor,
    y: Tensor,
    bandwidth: float | None = None,
    permutations: int = 200,
    limit: int = 1000,
    seed: int = 0,
) -> TwoSampleTest:
    """Kernel two-sample test of unit vectors (Gretton et al. 2012).

    `MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, means over different rows, with a Gaussian kernel. The
    p-value comes from permuting the union, which is exact when the rows are independent: give predictions and images
    of *different* pictures.

    Args:
        x: `(N, D)`, N >= 2.
        y: `(M, D)`, M >= 2.
        bandwidth: By default the median distance between rows of the union.
        permutations: Random relabellings.
        limit: Rows used of each set, the first ones.
        seed: Of the relabellings.
    """
    x, y = unit(x)[:limit], unit(y)[:limit]
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"mmd_test needs at least 2 rows in each set, found {n} and {m}")
    union = torch.cat([x, y])
    squares = (2 - 2 * union @ union.T).clamp(min=0)
    if bandwidth is None:
        upper = torch.triu_indices(n + m, n + m, offset=1, device=union.device)
        bandwidth = max(squares[upper[0], upper[1]].median().sqrt().item(), 1e-6)
    kernel = torch.exp(squares / (-2 * bandwidth**2))
    kernel.fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(n + m, permutations + 1, dtype=kernel.dtype)
    first[:n, 0] = 1
    for column in range(1, permutations + 1):
        first[torch.randperm(n + m, generator=generator)[:n], column] = 1
    first = first.to(kernel.device)
    second = 1 - first
    to_first, to_second = kernel @ first, kernel @ second
    values = (
        (first * to_first).sum(0) / (n * (n - 1))
        + (second * to_second).sum(0) / (m * (m - 1))
        - 2 * (first * to_second).sum(0) / (n * m)
    )
    as_large = (values[1:] >= values[0] - 1e-12).sum().item()
    return TwoSampleTest(values[0].item(), bandwidth, (1 + as_large) / (1 + permutations))
