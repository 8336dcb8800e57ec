"""The Cauchy-Schwarz divergence of two sets of points or two Gaussians, its terms, and the distance beside it."""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from csdiff.losses.arguments import Bandwidth, check_finite, check_number
from csdiff.losses.autograd import without_autocast
from csdiff.losses.kernels import Kernels


def cauchy_schwarz_divergence(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = 0.5,
    diagonal: bool = True,
    normalize: bool = False,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    within_y: Tensor | float | None = None,
) -> Tensor:
    r"""Cauchy-Schwarz divergence of the distributions two sets are drawn from, squared convention.

    `D(x, y) = log V(x, x) + log V(y, y) - 2 log V(x, y)`

    `V(a, b) = mean_ij k(a_i, b_j)`, `k(a, b) = exp(-||a - b||^2 / (2 bandwidth^2))`

    that is `-log((int p q)^2 / (int p^2 int q^2))` for the kernel density estimates p and q of x and y, or
    `-2 log cos` of the two mean embeddings in the kernel's Hilbert space. With the diagonal it is >= 0, and 0 for
    equal sets. Two single points: `||x - y||^2 / bandwidth^2`.

    Value and gradient come from one pass over blocks of pairs, so memory grows with N + M and not with N M. Sums are
    taken relative to the largest exponent, so sets far apart give finite values and gradients. There is no second
    derivative: `create_graph=True` raises RuntimeError.

    Precision: float32 agrees with float64 to 2e-4, value and gradient, on unit rows with a bandwidth of 0.1 or more.
    It cannot hold the answer where the kernel is 0 for all pairs or 1 for all (a bandwidth far below or far above all
    distances), nor distances far below the length of the rows. Pass float64 there: it agrees to 1e-9.

    ```python
    divergence = cauchy_schwarz_divergence(predicted, real, bandwidth=0.5, normalize=True)
    divergence.backward()
    ```

    Args:
        x: `(N, D)` rows, any floating dtype. float16 is computed in float32, and so is bfloat16 but for the products
            on a GPU, which take bfloat16 factors and float32 sums.
        y: `(M, D)` rows. M need not be N. Without a gradient it costs one product in place of three.
        bandwidth: kernel width in the units of the rows (after normalisation): a number > 0, a 0-d tensor, a sequence
            (the kernel is then the mean of the kernels), "median" or "silverman", see `resolve_bandwidth`.
        diagonal: whether the within-set means include the pairs `i = j`; if not they divide by `N (N - 1)`. Without it
            the estimate can be slightly negative.
        normalize: divide each row by its length first; a zero row stays zero.
        block_size: rows and columns evaluated at once; None takes 1024, 4096 on a GPU. The result does not depend on
            it.
        group: a process group whose processes hold shares of both sets, of any length. Every process returns the value
            for all rows; the gradient is `W` times that of the local rows, so that DDP's average over the `W`
            processes is the gradient of one process that holds all. Each process sends its rows once to each other
            process, `(N_local + M_local) D` elements, and a few numbers; no gradients.
        within_y: `log V(y, y)` computed before by `log_mean_kernel(y, ...)` with the same options, for a set y that
            stays the same from step to step.

    Returns:
        A scalar, float64 if an input is, else float32.

    Raises:
        ValueError: `N = 0` or `M = 0`, D that differ, rows that are not finite, `bandwidth <= 0`, an unknown rule, a
            bandwidth that requires a gradient, `diagonal=False` with a single row, `block_size < 1`, `within_y` with a
            y that requires a gradient or a value that is no logarithm of a mean kernel.

    Source:
        Yin et al., "CS-Aligner", arXiv 2502.17028; Jenssen, Principe, Erdogmus, Eltoft, "The Cauchy-Schwarz divergence
        and Parzen windowing", 2006.
    """
    known = None if within_y is None else _check_constant(within_y, y)
    kernels = Kernels(x, y, bandwidth, diagonal, normalize, block_size, group)
    if known is None:
        value = kernels.log_means({"xx": 1, "yy": 1, "xy": -2})
    else:
        value = kernels.log_means({"xx": 1, "xy": -2}) + known
    if diagonal:
        # Rounding may leave a value just below zero where the true one is zero; the gradient stays.
        value.detach().clamp_min_(0)
    return value.to(kernels.dtype)


def log_mean_kernel(
    x: Tensor,
    y: Tensor | None = None,
    *,
    bandwidth: Bandwidth = 0.5,
    diagonal: bool = True,
    normalize: bool = False,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""`log V(x, y)`, the logarithm of the mean Gaussian kernel between two sets, or within one.

    `log V(x, y) = log mean_ij exp(-||x_i - y_j||^2 / (2 bandwidth^2))`

    The three terms of `cauchy_schwarz_divergence` are `log_mean_kernel(x)`, `log_mean_kernel(y)` and
    `log_mean_kernel(x, y)`. `log_mean_kernel(x)` is minus the quadratic Renyi entropy of the set's density, up to a
    constant. A rule for the bandwidth looks at the rows given here alone.

    Rows, options, precision and errors are those of `cauchy_schwarz_divergence`; y is None for the pairs within x, the
    only ones that `diagonal` is about.

    Returns:
        A scalar <= 0, float64 if an input is, else float32.

    Source:
        Principe, "Information Theoretic Learning", 2010 (information potential and cross information potential).
    """
    kernels = Kernels(x, y, bandwidth, diagonal, normalize, block_size, group)
    return kernels.log_means({"xx" if y is None else "xy": 1}).to(kernels.dtype)


def squared_mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = 0.5,
    diagonal: bool = True,
    normalize: bool = False,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Squared maximum mean discrepancy of two sets, from the kernel sums of `cauchy_schwarz_divergence`.

    `MMD^2(x, y) = V(x, x) + V(y, y) - 2 V(x, y)`

    Rows, options, precision and errors are those of `cauchy_schwarz_divergence`. `diagonal=False` gives the unbiased
    estimate, zero in expectation for two samples of one distribution.

    Returns:
        A scalar, float64 if an input is, else float32.

    Source:
        Gretton et al., "A kernel two-sample test", 2012.
    """
    kernels = Kernels(x, y, bandwidth, diagonal, normalize, block_size, group)
    xx, yy, xy = (kernels.log_means({term: 1}).exp() for term in ("xx", "yy", "xy"))
    return (xx + yy - 2 * xy).to(kernels.dtype)


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
        log_overlaps = []
        for name, gap, cov in (
            ("cov_x", torch.zeros_like(mean_x), 2 * cov_x),
            ("cov_y", torch.zeros_like(mean_x), 2 * cov_y),
            ("cov_x + cov_y", mean_x - mean_y, cov_x + cov_y),
        ):
            factor, failed = torch.linalg.cholesky_ex(cov)
            if failed:
                raise ValueError(f"{name} must be positive definite; its leading minor of order {int(failed)} is not")
            overlap = MultivariateNormal(torch.zeros_like(mean_x), scale_tril=factor, validate_args=False)
            log_overlaps.append(overlap.log_prob(gap))
        # The integral of p q is the density of N(0, S_x + S_y) at the difference of the means.
        return log_overlaps[0] + log_overlaps[1] - 2 * log_overlaps[2]


def _check_constant(within_y: Tensor | float, y: Tensor) -> float:
    if isinstance(y, Tensor) and y.requires_grad:
        raise ValueError("within_y is a constant, but y requires a gradient; pass y.detach() or leave within_y out")
    if isinstance(within_y, Tensor) and within_y.numel() != 1:
        raise ValueError(f"within_y must be log V(y, y), one number; found shape {tuple(within_y.shape)}")
    value = float(within_y)
    # Rounding may leave that of a very wide kernel just above zero.
    if not (math.isfinite(value) and value <= 1e-6):
        raise ValueError(f"within_y must be log V(y, y), a finite number <= 0; found {value}")
    return value
