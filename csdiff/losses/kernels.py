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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csdiff.losses.arguments import Bandwidth, check_block_size, check_finite, check_sets, resolve_bandwidth
from csdiff.losses.autograd import with_gradient, without_autocast
from csdiff.losses.process_group import Share, gather_numbers, gather_rows
from csdiff.losses.tiles import add_product, compute_dtype, default_block, factor_dtype, tiles, unit_rows, wide_dtype


class Points(NamedTuple):
    """Centred rows `(N, D)` as the products take them, with their squared norms `(N,)` in the dtype of the sums."""

    rows: Tensor
    square: Tensor


class _Set(NamedTuple):
    """One argument: its local rows with their graph, where they stand, and the points of all processes."""

    local: Tensor
    share: Share
    points: Points


def combine_log_means(
    x: Tensor,
    y: Tensor | None,
    terms: str,
    combine: Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor | float]]],
    bandwidth: Bandwidth,
    diagonal: bool,
    normalize: bool,
    block_size: int | None,
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """A function of some of `log V(x, x)`, `log V(y, y)`, `log V(x, y)`, differentiable by x `(N, D)` and y `(M, D)`.

    `terms` are those wanted, of "xx", "yy" and "xy", separated by spaces; `combine` takes their values, 0-d tensors in
    float64 (float32 where the device has no other), to the value of the function and its derivatives by each of them.
    The options are those of `cauchy_schwarz_divergence`.
    """
    check_block_size(block_size)
    named = {"x": x} if y is None else {"x": x, "y": y}
    check_sets(**named)
    dtype = compute_dtype(*(rows.dtype for rows in named.values()))
    with without_autocast(x.device):
        sets, widths = _centred(named, dtype, bandwidth, unit_rows if normalize else Tensor.to, group)
    for name, one in sets.items():
        if name * 2 in terms and not diagonal and one.share.total == 1:
            raise ValueError(f"a mean without the diagonal needs at least two rows in {name}; found N = 1")
    block = block_size or default_block(x.device)

    def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        wanted = {name for name, one in zip(sets, needed, strict=True) if one}
        found = [_log_mean(term, sets, wanted, widths, block, diagonal, group) for term in terms.split()]
        value, derivatives = combine([log_mean for log_mean, _ in found])
        gradients: dict[str, Tensor] = {}
        for (_, pulls), derivative in zip(found, derivatives, strict=True):
            for name, (pull, scale) in pulls.items():
                pull.mul_(scale * derivative)
                gradients[name] = gradients[name].add_(pull) if name in gradients else pull
        return value.to(dtype), [gradients.get(name) for name in sets]

    return with_gradient(evaluate, *(one.local for one in sets.values()))


def _centred(
    named: dict[str, Tensor], dtype: torch.dtype, bandwidth: Bandwidth, prepare: Callable, group
) -> tuple[dict[str, _Set], tuple[float, ...]]:
    """The sets, with the origin between them, and the widths of the kernel, the widest first."""
    raw, shares = {}, {}
    for name, local in named.items():
        raw[name], shares[name] = gather_rows(name, local, group)
        if shares[name].total == 0:
            raise ValueError(f"{name} must have at least one row; found shape {tuple(local.shape)} (N = 0)")
    locals_ = {name: prepare(rows, dtype) for name, rows in named.items()}
    rows = [locals_[name].detach() if group is None else prepare(raw[name], dtype) for name in named]
    centre = sum(one.mean(dim=0) for one in rows) / len(rows)
    rows = [one - centre for one in rows]
    widths = resolve_bandwidth(bandwidth, *rows)[::-1]
    rows = [one.to(factor_dtype(*raw.values())) for one in rows]
    squares = [torch.linalg.vector_norm(one, dim=1, dtype=dtype).square_() for one in rows]
    if not math.isfinite(sum(one.sum() for one in squares)):
        for name, given in raw.items():
            check_finite(name, given)
        raise ValueError(f"the rows must have squared lengths within the range of {dtype}; found longer ones")
    points = map(Points, rows, squares)
    return dict(zip(named, map(_Set, locals_.values(), shares.values(), points), strict=True)), widths


def _log_mean(
    term: str, sets: dict[str, _Set], wanted: set[str], widths: tuple[float, ...], block: int, diagonal: bool, group
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """`log V` over the rows of all processes, and for sets by name a pull on the local rows with what scales it."""
    left, right = (sets[name] for name in term)
    world, pairs = left.share.world, left.share.total * right.share.total

    def sums(a: _Set, b: _Set, **options) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        local = Points(*(part[a.share.start : a.share.stop] for part in a.points))
        total, own_shift, *pulls = kernel_sums(local, b.points, widths, block=block, **options)
        shift, scale = own_shift, world / widths[0] ** 2
        if group is not None:
            totals, shifts = gather_numbers(torch.stack([total, own_shift]), group).unbind(dim=1)
            shift = shifts.max()
            total = (totals * torch.exp(shifts - shift)).sum()
            # Not from the logarithm of the total, whose digits a large shift takes up.
            scale = scale * torch.exp(own_shift - shift)
        return torch.log(total) + shift, scale / total, pulls

    if left is right:
        own = {"own": left.share.start, "diagonal": diagonal}
        log_total, scale, (pull, _) = sums(left, left, row_pull=term[0] in wanted, **own)
        pairs -= 0 if diagonal else left.share.total
        # Each row stands on both sides of its pairs.
        pulls = {term[0]: (pull, 2 * scale)}
    else:
        log_total, scale, (row, col) = sums(left, right, row_pull="x" in wanted, col_pull="y" in wanted and world == 1)
        pulls = {"x": (row, scale), "y": (col, scale)}
        if "y" in wanted and world > 1:
            # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
            _, scale, (row, _) = sums(right, left, row_pull=True)
            pulls["y"] = row, scale
    return log_total - math.log(pairs), {name: pull for name, pull in pulls.items() if name in wanted}


def kernel_sums(
    a: Points,
    b: Points,
    widths: tuple[float, ...],
    *,
    block: int,
    own: int | None = None,
    diagonal: bool = True,
    row_pull: bool = False,
    col_pull: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One pass over all pairs of `a` and `b` in tiles of `block` rows and columns, with the widest width first.

    Returns total, shift, and the pulls `mix_i - weight_i a_i` on a and on b that are wanted; all but the shift is to
    be multiplied by `exp(shift)`.
    Where `a` is a part of `b`, `own` is the index in `b` of its first row, and `diagonal` says whether the pairs of a
    point with itself are counted; where it is all of `b`, tiles are used for both of their places.
    """
    base = 1 / (2 * widths[0] ** 2)
    count, like, wide = len(a.square), a.square, wide_dtype(a.square.device)
    symmetric = own == 0 and count == len(b.square)
    # A pair of a point with itself has kernel 1: no exponent is above it, and the shift stays 0.
    ones = count if own is not None and diagonal else 0
    shift = None if ones else like.new_full((), torch.finfo(like.dtype).min / 2)
    total = like.new_full((), float(ones), dtype=wide)
    row_pulls = _Pull(a, block) if row_pull else None
    col_pulls = row_pulls if symmetric else _Pull(b, block) if col_pull else None
    norms, bias = (base * a.square)[:, None], -base * b.square
    for rows, cols, tile in tiles(a.rows, b.rows, scale=2 * base, bias=bias, block=block, own=own, upper=symmetric):
        tile.sub_(norms[rows])
        if shift is not None:
            before, shift = shift, torch.maximum(shift, tile.amax())
            total *= torch.exp((before - shift).to(wide))
        value, weight = _kernels(tile, [(widths[0] / width) ** 2 for width in widths], shift)
        mirrored = symmetric and rows != cols
        row_sums = value.sum(dim=1)
        total += row_sums.sum(dtype=wide) * (2 if mirrored else 1)
        if row_pulls is not None:
            row_pulls.add(rows, weight, row_sums if weight is value else weight.sum(dim=1), b.rows[cols], shift)
        if col_pulls is not None and (mirrored or not symmetric):
            col_pulls.add(cols, weight.T, weight.sum(dim=0), a.rows[rows], shift)
    row = None if row_pulls is None else row_pulls.finish(shift)
    col = None if col_pulls is None or symmetric else col_pulls.finish(shift)
    return total, total.new_zeros(()) if shift is None else shift.to(wide), row, col


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
        self.weight = torch.zeros_like(points.square)
        self.mix = torch.zeros_like(points.rows, dtype=points.square.dtype)
        self.shifts: dict[int, Tensor] = {}

    def add(self, part: slice, weight: Tensor, weight_sums: Tensor, others: Tensor, shift: Tensor | None) -> None:
        if shift is not None:
            self._move_to(shift, part)
        self.weight[part] += weight_sums
        add_product(self.mix[part], weight, others)

    def _move_to(self, shift: Tensor, part: slice) -> None:
        before = self.shifts.get(part.start, shift)
        self.shifts[part.start] = shift
        if before is not shift:
            factor = torch.exp(before - shift)
            self.weight[part] *= factor
            self.mix[part] *= factor

    def finish(self, shift: Tensor | None) -> Tensor:
        """`mix_i - weight_i a_i` at one shift."""
        for start in self.shifts:
            self._move_to(shift, slice(start, start + self.block))
        return self.mix.addcmul_(self.points.rows.to(self.mix.dtype), self.weight[:, None], value=-1)
