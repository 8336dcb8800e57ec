"""What callers pass in, checked at the public edge: rows, numbers, and the bandwidth, by number or by rule.

Each failure is one sentence that names the argument.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from csdiff.losses.process_group import Share, gather_rows
from csdiff.losses.tiles import compute_dtype, unit_rows

Bandwidth = float | Tensor | Sequence[float] | str
RULES = ("median", "silverman")
MEDIAN_ROWS = 2048


class NonFiniteRows(ValueError):
    """An input holds NaN or infinite numbers; a training loop may want to tell this from a wrong call."""


def check_sets(**sets: Tensor) -> None:
    """Raise ValueError unless these are floating-point tensors `(N, D)` of one D on one device; N may be 0."""
    for name, rows in sets.items():
        if not isinstance(rows, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor of shape (N, D); found {type(rows).__name__}")
        if rows.dim() != 2 or rows.shape[1] == 0:
            raise ValueError(f"{name} must have shape (N, D) with D > 0; found shape {tuple(rows.shape)}")
        if not rows.is_floating_point():
            raise ValueError(f"{name} must be floating point; found dtype {rows.dtype}")
    check_same_width(**sets)


def check_same_width(**sets: Tensor) -> None:
    """Raise ValueError unless the last dimensions and the devices of tensors agree."""
    names = " and ".join(sets)
    if len({rows.shape[-1] for rows in sets.values()}) > 1:
        shapes = " and ".join(str(tuple(rows.shape)) for rows in sets.values())
        raise ValueError(f"{names} must have the same D; found shapes {shapes}")
    if len({rows.device for rows in sets.values()}) > 1:
        raise ValueError(f"{names} must be on one device; found {' and '.join(str(r.device) for r in sets.values())}")


class GatheredSet(NamedTuple):
    """One set of a loss, ready to be computed with.

    `local` are the rows of this process with their graph, `rows` those of all processes without one, `given` the same
    before they were cast and normalised; `share` says where the local ones stand.
    """

    local: Tensor
    rows: Tensor
    given: Tensor
    share: Share


def gather_sets(
    named: dict[str, Tensor], normalize: bool, group: torch.distributed.ProcessGroup | None
) -> dict[str, GatheredSet]:
    """Checked sets in one dtype of float32 or better, with the rows of all processes; ValueError if there is none."""
    dtype = compute_dtype(*(rows.dtype for rows in named.values()))
    prepare = unit_rows if normalize else Tensor.to
    found = {}
    for name, rows in named.items():
        given, share = gather_rows(name, rows, group)
        if share.total == 0:
            raise ValueError(f"{name} must have at least one row; found shape {tuple(rows.shape)} (N = 0)")
        local = prepare(rows, dtype)
        found[name] = GatheredSet(local, local.detach() if group is None else prepare(given, dtype), given, share)
    return found


def check_finite(name: str, rows: Tensor) -> None:
    """Raise `NonFiniteRows` that names the first row of `(N, D)` rows with a NaN or an infinity."""
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
    if len(bad):
        kind = "NaN" if bool(rows[bad[0]].isnan().any()) else "infinite"
        raise NonFiniteRows(f"{name} must be finite; row {int(bad[0])} is {kind} ({len(bad)} of {len(rows)} rows)")


def check_number(name: str, value: float, *, zero: bool = False) -> float:
    """Return `value` as a float, or raise ValueError unless it is a finite number > 0 (with `zero`, >= 0)."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (0 < number < math.inf or (zero and number == 0)):
        raise ValueError(f"{name} must be a finite number {'>=' if zero else '>'} 0; found {value!r}")
    return number


def check_block_size(block_size: int | None) -> None:
    """Raise ValueError unless `block_size` is None or a positive integer."""
    if block_size is not None and not (isinstance(block_size, Integral) and block_size >= 1):
        raise ValueError(f"block_size must be None or an integer >= 1; found {block_size!r}")


def check_bandwidth(bandwidth: Bandwidth) -> tuple[float, ...] | None:
    """The widths, smallest first, None for a rule; ValueError for anything but numbers > 0 and the names of rules."""
    if isinstance(bandwidth, str):
        if bandwidth not in RULES:
            known = f"a number > 0, several, or one of {', '.join(RULES)}"
            raise ValueError(f"bandwidth must be {known}; found {bandwidth!r}")
        return None
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
    widths = check_bandwidth(bandwidth)
    if widths is not None:
        return widths
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
