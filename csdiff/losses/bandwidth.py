"""The width of the Gaussian kernel: numbers, mixtures and rules."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_positive

Bandwidth = float | Tensor | Sequence[float] | str
RULES = ("median", "silverman")
MEDIAN_ROWS = 2048


def check_bandwidth(bandwidth: Bandwidth) -> None:
    """Raise ValueError unless `bandwidth` is a positive float, a 0-d tensor, a sequence of them, or a rule's name."""
    if isinstance(bandwidth, str):
        if bandwidth not in RULES:
            raise ValueError(f"bandwidth must be a number > 0, several, or one of {', '.join(RULES)}; found {bandwidth!r}")
    elif not as_floats(bandwidth):
        raise ValueError("bandwidth must name at least one width; found an empty sequence")


def as_floats(bandwidth: float | Tensor | Sequence[float]) -> tuple[float, ...]:
    """The widths as floats, smallest first."""
    if isinstance(bandwidth, Tensor):
        if bandwidth.requires_grad:
            raise ValueError(
                "bandwidth must not require a gradient: widening the kernel without end would minimise the divergence; "
                "pass bandwidth.detach()"
            )
        if bandwidth.dim() > 1:
            raise ValueError(f"bandwidth must be a 0-d or 1-d tensor; found shape {tuple(bandwidth.shape)}")
        bandwidth = bandwidth.tolist()
    widths = bandwidth if isinstance(bandwidth, Sequence) else (bandwidth,)
    floats = (w.item() if isinstance(w, Tensor) and w.dim() == 0 else w for w in widths)
    return tuple(sorted(check_positive("bandwidth", w) for w in floats))


def resolve_bandwidth(bandwidth: Bandwidth, x: Tensor, y: Tensor | None = None) -> tuple[float, ...]:
    """The widths to use for the sets `x` (N, D) and `y` (M, D), smallest first; rules look at the pooled rows.

    - "median": the median distance between two different points of the pooled rows. Above `MEDIAN_ROWS` = 2048 pooled
      rows a subsample of that many, evenly spaced through them, is used, so the answer is the same on every call.
    - "silverman": `sqrt(2) h`, `h = s (4 / ((D + 2) n))^(1 / (D + 4))` for `n` pooled rows with mean coordinate
      variance `s^2`. The root turns the Parzen width `h` into the width of the kernel between two samples.

    Both are detached: no gradient flows through the width. Where all pooled rows coincide the kernel is 1 whatever its
    width, and the rules answer 1.
    """
    check_bandwidth(bandwidth)
    if not isinstance(bandwidth, str):
        return as_floats(bandwidth)
    rows = x.detach() if y is None else torch.cat([x.detach(), y.detach()])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    width = _median_distance(rows) if bandwidth == "median" else _silverman(rows)
    return (width if width > 0 else 1.0,)


def _median_distance(rows: Tensor) -> float:
    if len(rows) > MEDIAN_ROWS:
        picked = torch.linspace(0, len(rows) - 1, MEDIAN_ROWS, dtype=torch.float64).round().long()
        rows = rows[picked.to(rows.device)]
    rows = rows - rows.mean(dim=0)
    distances = torch.pdist(rows) if rows.device.type == "cpu" else _upper_distances(rows)
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 0.0


def _upper_distances(rows: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")[i, j]


def _silverman(rows: Tensor) -> float:
    count, dim = rows.shape
    deviation = math.sqrt(float(rows.var(dim=0, correction=0).mean()))
    return math.sqrt(2) * deviation * (4 / ((dim + 2) * count)) ** (1 / (dim + 4))
