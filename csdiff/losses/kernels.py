"""The kernel engine: logarithms of mean Gaussian kernels within and between two sets, with their gradients.

With `s_k = 1 / (2 width_k^2)`, the smallest of them `s_0`, and `d_ij = ||a_i - b_j||`, a pass over tiles of pairs adds

    total    = sum_ij mean_k exp(-s_k d_ij^2)
    weight_i = sum_j g_ij,   mix_i = sum_j g_ij b_j,   g_ij = mean_k (s_k / s_0) exp(-s_k d_ij^2)

so that the derivative of `log total` by `a_i` is `2 s_0 (mix_i - weight_i a_i) / total`, a softmax-weighted mean pull.
Squared distances come from the products `a_i . b_j`: points are centred between the sets first, which keeps their
digits. Sums are taken relative to `exp(shift)`, the shift being the largest exponent met so far, as in an online
softmax: tensors on the device, so that no tile waits for the host. Within a set each unordered pair of tiles is
evaluated once and counted twice.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csdiff.losses.arguments import (
    Bandwidth,
    check_block_size,
    check_finite,
    check_sets,
    gather_sets,
    resolve_bandwidth,
)
from csdiff.losses.autograd import with_gradient
from csdiff.losses.process_group import gather_numbers
from csdiff.losses.tiles import add_product, default_block, factor_dtype, tiles, wide_dtype


class Points(NamedTuple):
    """Centred rows `(N, D)` as the products take them, with `-s_0 |row|^2` `(N,)` in the dtype of the sums."""

    rows: Tensor
    norm: Tensor


class Kernels:
    """The Gaussian kernels of the sets x `(N, D)` and y `(M, D)`, or of x alone.

    The options are those of `cauchy_schwarz_divergence`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        bandwidth: Bandwidth,
        diagonal: bool,
        normalize: bool,
        block_size: int | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        check_block_size(block_size)
        named = {"x": x} if y is None else {"x": x, "y": y}
        check_sets(**named)
        sets = gather_sets(named, normalize, group)
        self.block, self.diagonal, self.group = block_size or default_block(x.device), diagonal, group
        self.local = {name: one.local for name, one in sets.items()}
        self.share = {name: one.share for name, one in sets.items()}
        self.dtype = self.local["x"].dtype
        centre = sum(one.rows.mean(dim=0) for one in sets.values()) / len(sets)
        rows = [one.rows - centre for one in sets.values()]
        # The widest first.
        self.widths = resolve_bandwidth(bandwidth, *rows)[::-1]
        factor = factor_dtype(*(one.given for one in sets.values()))
        rows = [one.to(factor) for one in rows]
        squares = [torch.linalg.vector_norm(one, dim=1, dtype=self.dtype).square_() for one in rows]
        if not math.isfinite(sum(one.sum() for one in squares)):
            for name, one in sets.items():
                check_finite(name, one.given)
            raise ValueError(f"the rows must have squared lengths within the range of {self.dtype}; found longer ones")
        norms = [square.mul_(-1 / (2 * self.widths[0] ** 2)) for square in squares]
        self.points = dict(zip(sets, map(Points, rows, norms), strict=True))

    def log_means(self, weights: dict[str, float]) -> Tensor:
        """The sum of `weight * log V` over the terms "xx", "yy" and "xy" named, differentiable by x and y.

        A 0-d tensor in float64 (float32 where the device has no other).
        """

        def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            value, gradients = None, {}
            wanted = {name for name, one in zip(self.local, needed, strict=True) if one}
            for term, weight in weights.items():
                log_mean, pulls = self._log_mean(term, wanted)
                value = weight * log_mean if value is None else value.add_(log_mean, alpha=weight)
                for name, (pull, scale) in pulls.items():
                    scale = (weight * scale).to(pull.dtype)
                    gradients[name] = gradients[name].addcmul_(pull, scale) if name in gradients else pull.mul_(scale)
            return value, [gradients.get(name) for name in self.local]

        return with_gradient(evaluate, *self.local.values())

    def _log_mean(self, term: str, wanted: set[str]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """`log V` over the rows of all processes; for the sets wanted, a pull on the local rows and what scales it."""
        left, right = term
        total, world = self.share[left].total, self.share[left].world
        pairs = total * self.share[right].total
        if left != right:
            log_total, scale, (row, col) = self._sums(left, right, left in wanted, right in wanted and world == 1)
            pulls = {left: (row, scale), right: (col, scale)}
            if right in wanted and world > 1:
                # The local rows of y meet all of x here: computing this again is cheaper than sending gradients.
                _, scale, (row, _) = self._sums(right, left, True, False)
                pulls[right] = row, scale
        else:
            pairs -= 0 if self.diagonal else total
            if pairs == 0:
                raise ValueError(f"a mean without the diagonal needs at least two rows in {left}; found N = 1")
            log_total, scale, (row, _) = self._sums(left, left, left in wanted, False)
            # Each row stands on both sides of its pairs.
            pulls = {left: (row, 2 * scale)}
        return log_total - math.log(pairs), {name: pull for name, pull in pulls.items() if name in wanted}

    def _sums(
        self, left: str, right: str, row_pull: bool, col_pull: bool
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The logarithm of the sum of kernels over all processes, what scales the pulls, the pulls of this process."""
        share = self.share[left]
        local = Points(*(part[share.start : share.stop] for part in self.points[left]))
        own = share.start if left == right else None
        total, own_shift, *pulls = kernel_sums(
            local, self.points[right], self.widths, self.block, own, self.diagonal, row_pull, col_pull
        )
        shift, scale = own_shift, share.world / self.widths[0] ** 2
        if self.group is not None:
            totals, shifts = gather_numbers(torch.stack([total, own_shift]), self.group).unbind(dim=1)
            shift = shifts.max()
            total = (totals * torch.exp(shifts - shift)).sum()
            # Not from the logarithm of the total, whose digits a large shift takes up.
            scale = scale * torch.exp(own_shift - shift)
        return torch.log(total) + shift, scale / total, pulls


def kernel_sums(
    a: Points,
    b: Points,
    widths: tuple[float, ...],
    block: int,
    own: int | None,
    diagonal: bool,
    row_pull: bool,
    col_pull: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One pass over all pairs of `a` and `b` in tiles of `block` rows and columns, with the widest width first.

    Returns total, shift, and the pulls `mix_i - weight_i a_i` on a and on b that are wanted; all but the shift is to
    be multiplied by `exp(shift)`.
    Where `a` is a part of `b`, `own` is the index in `b` of its first row, and `diagonal` says whether the pairs of a
    point with itself are counted; where it is all of `b`, tiles are used for both of their places.
    """
    ratios = [(widths[0] / width) ** 2 for width in widths]
    wide = wide_dtype(a.norm.device)
    symmetric = own == 0 and len(a.norm) == len(b.norm)
    # A pair of a point with itself has kernel 1: no exponent is above it, and the shift stays 0.
    ones = len(a.norm) if own is not None and diagonal else 0
    shift = a.norm.new_full((), 0.0 if ones else torch.finfo(a.norm.dtype).min / 2)
    total = shift.new_full((), float(ones), dtype=wide)
    row_pulls = _Pull(a, block) if row_pull else None
    col_pulls = row_pulls if symmetric else _Pull(b, block) if col_pull else None
    options = {"scale": 1 / widths[0] ** 2, "biases": (a.norm, b.norm), "block": block, "own": own, "upper": symmetric}
    for rows, cols, tile in tiles(a.rows, b.rows, **options):
        if not ones:
            before, shift = shift, torch.maximum(shift, tile.amax())
            total *= torch.exp((before - shift).to(wide))
        value, weight = _kernels(tile, ratios, None if ones else shift)
        mirrored = symmetric and rows != cols
        row_sums = value.sum(dim=1)
        total.add_(row_sums.sum(dtype=wide), alpha=2 if mirrored else 1)
        if row_pulls is not None:
            row_pulls.add(rows, weight, row_sums if weight is value else weight.sum(dim=1), b.rows[cols], shift)
        if col_pulls is not None and (mirrored or not symmetric):
            col_pulls.add(cols, weight.T, weight.sum(dim=0), a.rows[rows], shift)
    row = None if row_pulls is None else row_pulls.finish(shift)
    col = None if col_pulls is None or symmetric else col_pulls.finish(shift)
    return total, shift.to(wide), row, col


def _kernels(tile: Tensor, ratios: list[float], shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kernel and gradient weight of each pair from its exponent, which is overwritten."""
    if len(ratios) == 1:
        value = (tile if shift is None else tile.sub_(shift)).exp_()
        return value, value
    value, weight = torch.zeros_like(tile), torch.zeros_like(tile)
    for ratio in ratios:
        term = tile * ratio
        term = (term if shift is None else term.sub_(shift)).exp_()
        value.add_(term, alpha=1 / len(ratios))
        weight.add_(term, alpha=ratio / len(ratios))
    return value, weight


class _Pull:
    """`weight` and `mix` of the rows of a set, each block at the shift of the last tile that was added to it."""

    def __init__(self, points: Points, block: int):
        self.points, self.block = points, block
        self.weight = torch.zeros_like(points.norm)
        self.mix = torch.zeros_like(points.rows, dtype=points.norm.dtype)
        self.shifts: dict[int, Tensor] = {}

    def add(self, part: slice, weight: Tensor, weight_sums: Tensor, others: Tensor, shift: Tensor) -> None:
        self._move_to(shift, part)
        self.weight[part].add_(weight_sums)
        add_product(self.mix[part], weight, others)

    def _move_to(self, shift: Tensor, part: slice) -> None:
        before = self.shifts.get(part.start, shift)
        self.shifts[part.start] = shift
        if before is not shift:
            factor = torch.exp(before - shift)
            self.weight[part].mul_(factor)
            self.mix[part].mul_(factor)

    def finish(self, shift: Tensor) -> Tensor:
        """`mix_i - weight_i a_i` at one shift."""
        for start in self.shifts:
            self._move_to(shift, slice(start, start + self.block))
        return self.mix.addcmul_(self.points.rows.to(self.mix.dtype), self.weight[:, None], value=-1)
