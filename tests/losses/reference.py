"""Plain formulas in float64, written apart from the package, problems, and the yardstick of agreement."""

import math

import torch
import torch.nn.functional as F

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


def draw(*shape, seed=0):
    """Normal numbers in float64 that float32 holds exactly, so that both dtypes see the same problem."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def two_sets(n=53, m=38, dim=24):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for count in (n, m))
    return x.float().double(), (0.8 * y + 0.2).float().double()


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


def divergence(x, y, *, bandwidth, diagonal=True, normalize=False):
    x, y = x.double(), y.double()
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    widths = bandwidth if isinstance(bandwidth, (tuple, list)) else (bandwidth,)
    within = [log_mean_kernel(one, one, widths, exclude_own=not diagonal) for one in (x, y)]
    return within[0] + within[1] - 2 * log_mean_kernel(x, y, widths)


def token_divergence(x, y, *, x_mask=None, y_mask=None, **options):
    """By a loop over the pairs."""
    sides = []
    for rows, mask in ((x, x_mask), (y, y_mask)):
        sides.append(rows if mask is None else [row[kept] for row, kept in zip(rows, mask, strict=True)])
    return torch.stack([divergence(a, b, **options) for a, b in zip(*sides, strict=True)]).mean()


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


def assert_agree(found, expected, tolerance):
    """Values and gradients agree to `tolerance`, relative; a gradient is compared as one vector."""
    value, gradients = found
    right, right_gradients = expected
    assert abs(float(value) - float(right)) <= tolerance * abs(float(right)), (float(value), float(right))
    for one, other in zip(gradients, right_gradients, strict=True):
        assert torch.isfinite(one).all()
        error, size = float((one.double() - other.double()).norm()), float(other.double().norm())
        assert error <= tolerance * size, (error, size)
