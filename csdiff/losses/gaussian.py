"""The Cauchy-Schwarz divergence of two Gaussians, in closed form."""

import math

import torch
from torch import Tensor

from csdiff.losses.arguments import check_finite, check_number
from csdiff.losses.autograd import without_autocast


def gaussian_cauchy_schwarz(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, *, bandwidth: float | None = None
) -> Tensor:
    r"""Cauchy-Schwarz divergence of `N(mean_x, cov_x)` and `N(mean_y, cov_y)`, squared convention.

    `D = (m_x - m_y)^T (S_x + S_y)^-1 (m_x - m_y) + log|S_x + S_y| - (log|S_x| + log|S_y|) / 2 - d log 2`

    The kernel estimate of `cauchy_schwarz_divergence` smooths both densities: with a kernel of width `bandwidth` it
    tends, as the samples grow, to this value for the covariances `S + bandwidth^2 / 2 I`, because a Gaussian kernel
    of width `s` between samples is a Parzen window of width `s / sqrt(2)` on each side.

    Args:
        mean_x: `(d,)` mean.
        cov_x: `(d, d)` symmetric positive definite covariance.
        mean_y: `(d,)` mean.
        cov_y: `(d, d)` covariance.
        bandwidth: width of the kernel whose smoothing is to be included; none by default.

    Returns:
        A scalar, differentiable in all four tensors; float32 or better.

    Raises:
        ValueError: shapes that do not fit together, entries that are not finite, a covariance that is not positive
            definite, `bandwidth <= 0`.

    Source:
        Kampa, Hasanbelliu, Principe, "Closed-form Cauchy-Schwarz PDF divergence for mixture of Gaussians", 2011.
    """
    (dim,) = mean_x.shape if mean_x.dim() == 1 else (None,)
    if dim is None or mean_y.shape != (dim,) or cov_x.shape != (dim, dim) or cov_y.shape != (dim, dim):
        raise ValueError(
            "expected mean_x (d,), cov_x (d, d), mean_y (d,), cov_y (d, d) with one d; found "
            f"{tuple(mean_x.shape)}, {tuple(cov_x.shape)}, {tuple(mean_y.shape)}, {tuple(cov_y.shape)}"
        )
    if bandwidth is not None:
        check_number("bandwidth", bandwidth)
    for name, given in (("mean_x", mean_x), ("cov_x", cov_x), ("mean_y", mean_y), ("cov_y", cov_y)):
        check_finite(name, given.reshape(dim, -1))
    with without_autocast(mean_x.device):
        dtype = torch.promote_types(torch.promote_types(mean_x.dtype, mean_y.dtype), torch.float32)
        mean_x, cov_x, mean_y, cov_y = (t.to(dtype) for t in (mean_x, cov_x, mean_y, cov_y))
        if bandwidth is not None:
            smoothing = bandwidth**2 / 2 * torch.eye(dim, dtype=dtype, device=mean_x.device)
            cov_x, cov_y = cov_x + smoothing, cov_y + smoothing
        factors = []
        for name, cov in (("cov_x", cov_x), ("cov_y", cov_y), ("cov_x + cov_y", cov_x + cov_y)):
            factor, failed = torch.linalg.cholesky_ex(cov)
            if failed:
                raise ValueError(f"{name} must be positive definite; its leading minor of order {int(failed)} is not")
            factors.append(factor)
        det_x, det_y, det = (2 * factor.diagonal().log().sum() for factor in factors)
        gap = torch.linalg.solve_triangular(factors[2], (mean_x - mean_y)[:, None], upper=False).square().sum()
        return gap + (det - (det_x + det_y) / 2 - dim * math.log(2))
