"""Checks of what callers pass in, at the public edge; each failure is one sentence that names the argument."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor


class NonFiniteRows(ValueError):
    """An input holds NaN or infinite numbers; a training loop may want to tell this from a wrong call."""


def check_matrix(name: str, rows: Tensor) -> None:
    """Raise ValueError unless `rows` is a floating-point `(N, D)` tensor; `N` may be 0."""
    if not isinstance(rows, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of shape (N, D); found {type(rows).__name__}")
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, D) with D > 0; found shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point; found dtype {rows.dtype}")


def check_finite(name: str, rows: Tensor) -> None:
    """Raise `NonFiniteRows` that names the first row of `(N, D)` rows with a NaN or an infinity."""
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
    if len(bad):
        kind = "NaN" if bool(rows[bad[0]].isnan().any()) else "infinite"
        raise NonFiniteRows(f"{name} must be finite; row {int(bad[0])} is {kind} ({len(bad)} of {len(rows)} rows)")


def check_same_width(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
    """Raise ValueError unless the last dimensions and the devices of two tensors agree."""
    both = " and ".join(names)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{both} must have the same D; found shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{both} must be on one device; found {x.device} and {y.device}")


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
