"""The width of the Gaussian kernel: numbers, mixtures and rules."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csdiff.losses.arguments import check_number

Bandwidth = float | Tensor | Sequence[float] | str
RULES = ("median", "silverman")
MEDIAN_ROWS = 2048


def check_bandwidth(bandwidth: Bandwidth) -> None:
    """Raise ValueError unless `bandwidth` is a positive number, several of them in a sequence or tensor, or a rule."""
    if not isinstance(bandwidth, str):
        as_widths(bandwidth)
    elif bandwidth not in RULES:
        raise ValueError(f"bandwidth must be a number > 0, several, or one of {', '.join(RULES)}; found {bandwidth!r}")


def as_widths(bandwidth: float | Tensor | Sequence[float]) -> tuple[float, ...]:
    """The widths as floats, smallest first."""
    if isinstance(bandwidth, Tensor) and bandwidth.requires_grad:
        raise ValueError(
            "bandwidth must not require a gradient, since widening the kernel without end would minimise the "
            "divergence; found a tensor that does: pass bandwidth.detach()"
        )
    widths = torch.as_tensor(bandwidth, dtype=torch.float64).flatten().tolist()
    if not widths:
        raise ValueError("bandwidth must hold at least one width; found an empty sequence")
    return tuple(sorted(check_number("bandwidth", width) for width in widths))


def resolve_bandwidth(bandwidth: Bandwidth, *sets: Tensor) -> tuple[float, ...]:
    """The widths to use for sets of rows `(N, D)`, smallest first; the rules look at the rows of all sets, pooled.

    - "median": the median distance between two different points of the pooled rows. Above `MEDIAN_ROWS` = 2048 pooled
      rows, of that many of them, evenly spaced, so that the answer is the same on every call and every process.
    - "silverman": `sqrt(2) h` with `h = s (4 / ((D + 2) n))^(1 / (D + 4))`, for `n` pooled rows of mean coordinate
      variance `s^2`. The root turns the width of a Parzen window into that of the kernel between two samples.

    No gradient flows through the width. Where all pooled rows coincide the kernel is 1 whatever its width, and the
    rules answer 1.

    Raises:
        ValueError: a width that is not a finite number > 0, an unknown rule, a tensor that requires a gradient.
    """
    check_bandwidth(bandwidth)
    if not isinstance(bandwidth, str):
        return as_widths(bandwidth)
    pooled = torch.cat([rows.detach() for rows in sets])
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    width = _median_distance(pooled) if bandwidth == "median" else _silverman_width(pooled)
    return (width if width > 0 else 1.0,)


def _median_distance(rows: Tensor) -> float:
    if len(rows) > MEDIAN_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MEDIAN_ROWS, dtype=torch.float64).round().long().to(rows.device)]
    distances = torch.pdist(rows)
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 0.0


def _silverman_width(rows: Tensor) -> float:
    count, dim = rows.shape
    variance = float(rows.var(dim=0, correction=0).mean())
    return math.sqrt(2 * variance) * (4 / ((dim + 2) * count)) ** (1 / (dim + 4))
