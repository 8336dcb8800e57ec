"""Distances between two sets of embeddings `(N, D)` and `(M, D)` on the unit sphere; rows are samples, at least 2."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csdiff.devices import threads

_BLOCK = 2048
_TESTED = 1000


def unit(z: Tensor) -> Tensor:
    """Rows over their norms, in float64."""
    return F.normalize(z.detach().double(), dim=-1)


def centroid_gap(x: Tensor, y: Tensor) -> float:
    """Distance of the centroids of the unit vectors, `||mean(x/|x|) - mean(y/|y|)||`, in [0, 2]."""
    return (unit(x).mean(0) - unit(y).mean(0)).norm().item()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians fitted to the unit vectors, `|m1-m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    It is biased upwards on small samples: print real against real beside it, or see :func:`frechet_extrapolated`.
    """
    return feature_frechet_distance(unit(x), unit(y))


def feature_frechet_distance(x: Tensor, y: Tensor) -> float:
    """The same of the rows as they are, not normalised: FID, given features of pictures."""
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
    _need_two_rows(z)
    return (z - z.mean(0)) / (len(z) - 1) ** 0.5


def _need_two_rows(*sets: Tensor) -> None:
    if min(map(len, sets)) < 2:
        raise ValueError(f"expected at least 2 rows in each set, found {' and '.join(str(len(z)) for z in sets)}")


def frechet_extrapolated(
    x: Tensor, y: Tensor, seed: int = 0, distance: Callable[[Tensor, Tensor], float] = frechet_distance
) -> float:
    """Frechet distance for infinitely many samples: the intercept of a line in 1/n (Chong and Forsyth 2020).

    The bias falls as 1/n. It is measured on random subsets of n rows of both sets, n from a fifth of the rows to all
    of them, evenly in 1/n, and the fitted line is read at 1/n = 0. With fewer rows than a few times D the line is bent
    and the result too high, or below zero: real against real shows how far off it is.

    Of features of pictures `distance` is :func:`feature_frechet_distance`.
    """
    count = min(len(x), len(y))
    inverse = torch.linspace(1 / count, 5 / count, 6, dtype=torch.float64)
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
    """
    return 1000 * unbiased_mmd(x, y, lambda products: (products + 1).pow(3))


def unbiased_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """`mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, k a function of the products of unit vectors, in blocks."""
    _need_two_rows(x, y)
    x, y = unit(x), unit(y)

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(kernel(rows @ b.T).sum() for rows in a.split(_BLOCK))

    within = [(total(z, z) - kernel((z * z).sum(1)).sum()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (sum(within) - 2 * total(x, y) / (len(x) * len(y))).item()


class TwoSampleTest(NamedTuple):
    """Outcome of :func:`mmd_test`; a small p-value means two different distributions."""

    squared: float
    bandwidth: float
    p_value: float


def mmd_test(
    x: Tensor, y: Tensor, bandwidth: float | None = None, permutations: int = 200, seed: int = 0
) -> TwoSampleTest:
    """Kernel two-sample test of unit vectors (Gretton et al. 2012).

    `MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, means over different rows, with the Gaussian kernel
    `k = exp(-|x-y|^2 / (2 bandwidth^2))`. The p-value is the part of the permutations of the union with an MMD^2 as
    large, which is exact when the rows are independent: give predictions and images of *different* pictures. Of each
    set the first 1,000 rows are used; the bandwidth is by default the median distance between rows of the union.
    """
    _need_two_rows(x, y)
    x, y = unit(x)[:_TESTED], unit(y)[:_TESTED]
    n, m = len(x), len(y)
    union = torch.cat([x, y])
    squares = (2 - 2 * union @ union.T).clamp(min=0)
    if bandwidth is None:
        upper = torch.triu_indices(n + m, n + m, offset=1, device=union.device)
        bandwidth = max(squares[upper[0], upper[1]].median().sqrt().item(), 1e-6)
    kernel = torch.exp(squares / (-2 * bandwidth**2)).fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(n + m), *(torch.randperm(n + m, generator=generator) for _ in range(permutations))]
    # A column a labelling: 1 where a row belongs to the first set.
    first = (torch.stack(orders).argsort(1) < n).T.to(kernel)
    second = 1 - first
    to_second = kernel @ second
    values = (
        (first * (kernel @ first)).sum(0) / (n * (n - 1))
        + (second * to_second).sum(0) / (m * (m - 1))
        - 2 * (first * to_second).sum(0) / (n * m)
    )
    as_large = (values[1:] >= values[0] - 1e-12).sum().item()
    return TwoSampleTest(values[0].item(), bandwidth, (1 + as_large) / (1 + permutations))
