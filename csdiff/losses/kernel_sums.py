"""Sums of Gaussian kernels over all pairs of two sets, with the weighted sums their gradients need, block by block.

With `s_k = 1 / (2 width_k^2)` and `d_ij^2 = ||a_i - b_j||^2`, one pass over the pairs gives

    total      = sum_ij  mean_k exp(-s_k d_ij^2)
    row_weight = sum_j   g_ij,            row_mix = sum_j g_ij b_j,        g_ij = mean_k (s_k / s_0) exp(-s_k d_ij^2)
    col_weight, col_mix likewise over i

all times exp(-shift), so that nothing under- or overflows: `shift` follows the largest exponent met so far and what
was summed before is rescaled when it grows. The derivative of `total` by `a_i` is
`-2 s_0 (row_weight_i a_i - row_mix_i)`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import Products

# The shift follows the largest exponent with this slack: exp(SLACK) is harmless and rescaling stays rare.
SLACK = 20.0
# Points nearer than this, as a fraction of the squared radius, are treated pair by pair: rounding of expanded squares
# would show in their distance, and that of their rows in `weight_i a_i - mix_i`, where they nearly cancel.
NEAR = 1e-3
# Up to this share of a tile may be near; beyond it the tiles are marked as crowded.
FEW_NEAR = 1 / 64


@dataclass
class PairSums:
    """What one pass over the pairs `(a_i, b_j)` leaves; every field but `shift` is to be multiplied by `exp(shift)`.

    With `small` set the kernel is summed as `exp(.) - 1` and the shift is 0: `total` is short of the true sum by the
    number of pairs, and keeps its digits where every kernel value is close to 1.
    """

    small: bool
    shift: float
    total: Tensor
    row_weight: Tensor | None = None
    row_mix: Tensor | None = None
    col_weight: Tensor | None = None
    col_mix: Tensor | None = None

    def log_sum(self) -> Tensor:
        """The logarithm of `total`, with the shift; -inf for no pairs."""
        return self.total.log() + self.shift

    def rescale(self, factor: float) -> None:
        for field in (self.total, self.row_weight, self.row_mix, self.col_weight, self.col_mix):
            if field is not None:
                field.mul_(factor)


@dataclass
class Points:
    """Centred rows `(N, D)` as the products take them, with their squared norms `(N,)`."""

    rows: Tensor
    square: Tensor

    def slice(self, start: int, stop: int) -> "Points":
        return Points(self.rows[start:stop], self.square[start:stop])

    def __len__(self) -> int:
        return len(self.square)


class KernelTiles:
    """Evaluates tiles of the kernel for given widths, in buffers that are used again from tile to tile.

    `crowded` is set when a tile held too many points near each other for the digits of float32.
    """

    def __init__(
        self,
        widths: tuple[float, ...],
        products: Products,
        dtype: torch.dtype,
        radius: float,
        *,
        small: bool,
        direct: bool = False,
    ):
        scales = [1 / (2 * width**2) for width in widths]
        self.base = min(scales)
        self.ratios = [scale / self.base for scale in scales]
        self.products, self.dtype, self.small, self.direct = products, dtype, small, direct
        self.crowded = False
        self.near = -self.base * NEAR * radius**2 if dtype == torch.float32 and not small else math.inf
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, a: Points, b: Points) -> Tensor:
        size = len(a) * len(b)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=a.square.device)
        return held[:size].view(len(a), len(b))

    def exponents(self, a: Points, b: Points) -> Tensor:
        """`-s_0 ||a_i - b_j||^2` as `(len(a), len(b))`, at most 0; `s_0` belongs to the widest kernel."""
        tile = self._buffer("exponent", a, b)
        if self.direct:
            distance = torch.cdist(a.rows, b.rows, compute_mode="donot_use_mm_for_euclid_dist")
            return torch.mul(distance.square_(), -self.base, out=tile)
        self.products.cross(a.rows, b.rows, -self.base * b.square, 2 * self.base, out=tile)
        return tile.sub_((self.base * a.square)[:, None]).clamp_(max=0)

    def kernels(self, exponent: Tensor, shift: float, a: Points, b: Points) -> tuple[Tensor, Tensor]:
        """Value and gradient weight of each pair from its exponent, which is overwritten."""
        evaluate = torch.expm1 if self.small else torch.exp
        if len(self.ratios) == 1:
            if shift:
                exponent.sub_(shift)
            evaluate(exponent, out=exponent)
            return exponent, exponent
        value, weight, term = (self._buffer(name, a, b) for name in ("value", "weight", "term"))
        for k, ratio in enumerate(self.ratios):
            torch.mul(exponent, ratio, out=term)
            if shift:
                term.sub_(shift)
            evaluate(term, out=term)
            if k == 0:
                value.copy_(term)
                torch.mul(term, ratio, out=weight)
            else:
                value.add_(term)
                weight.add_(term, alpha=ratio)
        count = len(self.ratios)
        return value.div_(count), weight.div_(count)


def kernel_sums(
    a: Points,
    b: Points,
    tiles: KernelTiles,
    *,
    block: int,
    row_gradient: bool = False,
    col_gradient: bool = False,
    own: int | None = None,
    floor: float = -math.inf,
) -> PairSums:
    """One pass over all pairs of `a` and `b`.

    Args:
        a: one set.
        b: the other.
        tiles: the kernel.
        block: rows and columns of a tile.
        row_gradient: whether `row_*` of the result is wanted.
        col_gradient: whether `col_*` is.
        own: the index in `b` of the first row of `a` when `a` is a part of `b`: a point's pair with itself is left
            out. When `a` is all of `b` each unordered pair is evaluated once and counted twice.
        floor: the exponent of a pair the caller will add itself; tiles that vanish beside it are skipped.
    """
    symmetric = own == 0 and len(a) == len(b)
    wide = torch.float64 if a.square.device.type != "mps" else torch.float32
    sums = PairSums(tiles.small, 0.0 if tiles.small else -math.inf, a.square.new_zeros((), dtype=wide))
    if row_gradient:
        sums.row_weight, sums.row_mix = _zeros(a, wide)
    if col_gradient and not symmetric:
        sums.col_weight, sums.col_mix = _zeros(b, wide)
    # Below this distance from the shift exp gives zero in the dtype at hand.
    vanish = 110.0 if tiles.dtype == torch.float32 else 750.0

    for i in range(0, len(a), block):
        a_i = a.slice(i, i + block)
        for j in range(i if symmetric else 0, len(b), block):
            b_j = b.slice(j, j + block)
            exponent = tiles.exponents(a_i, b_j)
            diagonal = None if own is None else _own_pairs(exponent, own + i - j)
            if diagonal is not None:
                diagonal.fill_(0.0 if tiles.small else -math.inf)
            if not tiles.small:
                top = float(exponent.max())
                if top < max(sums.shift, floor) - vanish or top == -math.inf:
                    continue
                if top > sums.shift + SLACK or sums.shift == -math.inf:
                    if sums.shift != -math.inf:
                        sums.rescale(math.exp(sums.shift - top))
                    sums.shift = top
            near = None
            if not tiles.small and top > tiles.near:
                near = _NearPairs(exponent, a_i, b_j, tiles)
            value, weight = tiles.kernels(exponent, sums.shift, a_i, b_j)
            mirrored = symmetric and i != j
            by_row = value.sum(dim=1)
            sums.total += by_row.sum(dtype=wide) * (2 if mirrored else 1)
            if near is not None:
                near.take(weight)
                near.add(sums.row_mix, sums.row_mix if mirrored else sums.col_mix, i, j)
            if row_gradient:
                sums.row_weight[i : i + block] += by_row if weight is value and not near else weight.sum(dim=1)
                tiles.products.mix(sums.row_mix[i : i + block], weight, b_j.rows)
                if mirrored:
                    sums.row_weight[j : j + block] += weight.sum(dim=0)
                    tiles.products.mix(sums.row_mix[j : j + block], weight.T, a_i.rows)
            if sums.col_weight is not None:
                sums.col_weight[j : j + block] += weight.sum(dim=0)
                tiles.products.mix(sums.col_mix[j : j + block], weight.T, a_i.rows)

    if tiles.small:
        _restore_ones(sums, a, b, sum(tiles.ratios) / len(tiles.ratios))
    return sums


class _NearPairs:
    """The pairs of a tile so near that their distance and pull are taken from the difference of the two rows."""

    def __init__(self, exponent: Tensor, a: Points, b: Points, tiles: KernelTiles):
        self.rows, self.cols = (exponent > tiles.near).nonzero(as_tuple=True)
        if len(self.rows) > FEW_NEAR * exponent.numel():
            tiles.crowded = True
            self.rows, self.cols = self.rows[:0], self.cols[:0]
        self.a, self.b = a, b
        for part in self._parts():
            exponent[self.rows[part], self.cols[part]] = self._difference(part).square().sum(dim=1) * -tiles.base

    def _parts(self) -> list[slice]:
        return [slice(start, start + 1024) for start in range(0, len(self.rows), 1024)]

    def _difference(self, part: slice) -> Tensor:
        return self.a.rows[self.rows[part]].to(self.a.square.dtype) - self.b.rows[self.cols[part]]

    def take(self, weight: Tensor) -> None:
        """Move the weights of these pairs out of the tile."""
        self.weight = weight[self.rows, self.cols]
        weight[self.rows, self.cols] = 0

    def add(self, row_mix: Tensor | None, col_mix: Tensor | None, i: int, j: int) -> None:
        """Add the pull of these pairs, `weight_ij (b_j - a_i)` on the row and its opposite on the column."""
        for part in self._parts() if row_mix is not None or col_mix is not None else []:
            pull = self._difference(part).mul_(self.weight[part, None])
            if col_mix is not None:
                col_mix.index_add_(0, self.cols[part] + j, pull)
            if row_mix is not None:
                row_mix.index_add_(0, self.rows[part] + i, pull, alpha=-1)


def _zeros(points: Points, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(len(points), dtype=wide, device=points.square.device)
    return weight, torch.zeros(points.rows.shape, dtype=points.square.dtype, device=points.square.device)


def _own_pairs(tile: Tensor, offset: int) -> Tensor | None:
    """A view of the entries `(i, i + offset)` of a tile, None where it has none."""
    rows, cols = tile.shape
    return tile.diagonal(offset) if -rows < offset < cols else None


def _restore_ones(sums: PairSums, a: Points, b: Points, ones: float) -> None:
    """Put back into the gradient sums the constant 1 that `exp - 1` left out; `total` stays short of it."""
    if sums.row_weight is not None:
        sums.row_weight += ones * len(b)
        sums.row_mix += ones * b.rows.sum(dim=0, dtype=sums.row_mix.dtype)
    if sums.col_weight is not None:
        sums.col_weight += ones * len(a)
        sums.col_mix += ones * a.rows.sum(dim=0, dtype=sums.col_mix.dtype)
