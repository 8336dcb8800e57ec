"""The Cauchy-Schwarz divergence between two sets of points, the terms it is made of, and the distance beside it."""

import math

import torch
from torch import Tensor

from csdiff.losses.bandwidth import Bandwidth
from csdiff.losses.kernels import KernelOptions, combine_log_means


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

    def combine(log_means: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        value = log_means[0] + (log_means[1] if known is None else known) - 2 * log_means[-1]
        # Rounding may leave a value just below zero where the true one is zero.
        value = value.clamp_min(0) if diagonal else value
        return value, (1, 1, -2) if known is None else (1, -2)

    options = KernelOptions(bandwidth, diagonal, normalize, block_size, group)
    return combine_log_means(x, y, "xx yy xy" if known is None else "xx xy", combine, options)


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
    options = KernelOptions(bandwidth, diagonal, normalize, block_size, group)
    return combine_log_means(x, y, "xx" if y is None else "xy", lambda found: (found[0], (1,)), options)


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

    def combine(log_means: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        xx, yy, xy = (log_mean.exp() for log_mean in log_means)
        return xx + yy - 2 * xy, (xx, yy, -2 * xy)

    options = KernelOptions(bandwidth, diagonal, normalize, block_size, group)
    return combine_log_means(x, y, "xx yy xy", combine, options)


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
