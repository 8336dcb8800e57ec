"""Plain formulas in float64, written apart from the package, and the yardstick of agreement."""

import math

import torch
import torch.nn.functional as F

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


def squared_distances(x, y):
    return (x[:, None, :] - y[None, :, :]).square().sum(dim=2)


def log_mean_kernel(x, y, widths, *, exclude_own=False):
    """Log of the mean kernel by direct differences: no expanded squares, no blocks."""
    square = squared_distances(x, y)
    exponents = torch.stack([-square / (2 * width**2) for width in widths])
    pairs = square.numel()
    if exclude_own:
        exponents = exponents.masked_fill(torch.eye(len(x), dtype=torch.bool), -math.inf)
        pairs -= len(x)
    # log1p of a mean of expm1 where kernels are close to 1, else log-sum-exp.
    if exponents.isfinite().all() and exponents.min() > -1:
        return torch.log1p(torch.expm1(exponents).mean())
    return exponents.flatten().logsumexp(dim=0) - math.log(pairs * len(widths))


def log_mean_kernel_within(x, widths, *, exclude_own):
    return log_mean_kernel(x, x, widths, exclude_own=exclude_own)


def divergence(x, y, *, bandwidth, diagonal=True, normalize=False):
    x, y = x.double(), y.double()
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    widths = bandwidth if isinstance(bandwidth, (tuple, list)) else (bandwidth,)
    within = [log_mean_kernel(one, one, widths, exclude_own=not diagonal) for one in (x, y)]
    return within[0] + within[1] - 2 * log_mean_kernel(x, y, widths)


def info_nce(x, y, *, temperature, two_sided=True, normalize=False):
    x, y = x.double(), y.double()
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits = x @ y.T / (temperature.double() if isinstance(temperature, torch.Tensor) else temperature)
    loss = cross_entropy_of_diagonal(logits)
    return (loss + cross_entropy_of_diagonal(logits.T)) / 2 if two_sided else loss


def cross_entropy_of_diagonal(logits):
    # log(1 + sum_{j != i} exp(l_ij - l_ii)), which F.cross_entropy rounds to zero when small.
    others = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -math.inf).logsumexp(dim=1)
    return F.softplus(others - logits.diagonal(), threshold=1e9).mean()


def value_and_gradients(function, *tensors, dtype=torch.float64, **options):
    """The value and its gradients by copies of the tensors in `dtype`."""
    copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
    value = function(*copies, **options)
    gradients = torch.autograd.grad(value, copies)
    return value.detach(), gradients


def assert_agree(found, expected, tolerance, floor=0.0):
    """Values and gradients agree to `tolerance`, relative; a gradient is compared as one vector.

    `floor` is the size below which a value or gradient counts as zero.
    """
    value, gradients = found
    right, right_gradients = expected
    assert abs(float(value) - float(right)) <= tolerance * abs(float(right)) + floor, (float(value), float(right))
    for one, other in zip(gradients, right_gradients, strict=True):
        assert torch.isfinite(one).all()
        error, size = float((one.double() - other.double()).norm()), float(other.double().norm())
        assert error <= tolerance * size + floor, (error, size)
