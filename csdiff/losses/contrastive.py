"""InfoNCE: each row picks its partner out of all the rows of the other set."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_block_size, check_matrix, check_positive, check_same_width, without_autocast
from .dense import differentiable_info_nce
from .process_group import gather_numbers, gather_rows
from .row_set import BLOCK, RowSet, wide_dtype
from .small_sets import PLAIN_REACH, small_info_nce

# Logits above this lose the fifth digit of their softmax in float32.
FLOAT32_REACH = 200.0
# Up to this many pairs the logits are kept between the two passes.
KEPT_PAIRS = 2**24


@dataclass(frozen=True)
class _Options:
    two_sided: bool
    normalize: bool
    block_size: int | None
    group: torch.distributed.ProcessGroup | None


def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    two_sided: bool = True,
    normalize: bool = False,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""InfoNCE over pairs `(x_i, y_i)`: cross entropy of picking the partner among all rows.

    `L = (R + C) / 2`, `R = -mean_i log(exp(l_ii) / sum_j exp(l_ij))`, `C` the same over columns,
    `l_ij = x_i . y_j / temperature`

    One pass over blocks of pairs finds the two log sums, a second one the gradient, so memory grows with N and no
    `N x N` matrix is kept (up to 4096 rows with `block_size=None` it is: that saves a product). The pair itself is
    left out of the log sums and put back exactly, so small losses keep their digits. A second derivative works
    without `group` and takes memory of the order N^2.

    Args:
        x: `(N, D)` rows, any floating dtype; computed in float32 or better. The logits are plain products of the rows:
            pass unit rows, or `normalize=True`, for cosines.
        y: `(N, D)` rows, the partners.
        temperature: a number > 0, or a tensor with one element, which may require a gradient.
        two_sided: False leaves `R` alone: x picks among y.
        normalize: divide each row by its length first; a zero row stays zero.
        block_size: rows and columns evaluated at once; None lets measured size decide. The result does not depend on
            it.
        group: a process group whose processes hold shares of the pairs, of any length. Every process returns the value
            for all pairs; the gradient by the rows is `W` times that of the local rows and that by the temperature is
            the whole one, so that DDP's average over the `W` processes is that of one process that holds all.
            Each process sends its rows once to each other process, `2 N_local D` elements, and N numbers; no
            gradients.

    Returns:
        A scalar >= 0, float64 if an input is, else float32.

    Raises:
        ValueError: x and y of different shapes, no rows, rows that are not finite, `temperature <= 0`,
            `block_size < 1`.

    Source:
        van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018; symmetric as in
        Radford et al., "CLIP", 2021.
    """
    check_matrix("x", x)
    check_matrix("y", y)
    check_same_width(x, y)
    if len(x) != len(y):
        raise ValueError(f"x and y must be pairs, with the same N; found shapes {tuple(x.shape)} and {tuple(y.shape)}")
    check_block_size(block_size)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must have one element; found shape {tuple(temperature.shape)}")
        check_positive("temperature", temperature.item())
    else:
        temperature = check_positive("temperature", temperature)
    options = _Options(two_sided, normalize, block_size, group)
    with without_autocast(x.device):
        if group is None and block_size is None:
            found = small_info_nce(x, y, temperature, two_sided, normalize)
            if found is not None:
                return found
        return _InfoNCE.apply(x, y, temperature, options, torch.is_grad_enabled())


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, temperature, options, with_gradient):
        wants = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        scale = 1 / float(temperature)
        value, *gradients = _evaluate(x, y, scale, options, wants)
        if wants[2]:
            slope = (gradients[2] * -scale).to(temperature.device, temperature.dtype)
            gradients[2] = slope.reshape(temperature.shape)
        ctx.options, ctx.temperature = options, temperature
        ctx.save_for_backward(x, y, *gradients)
        return value.to(torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32))

    @staticmethod
    def backward(ctx, grad):
        x, y, by_x, by_y, slope = ctx.saved_tensors
        options = ctx.options
        if torch.is_grad_enabled():
            if options.group is not None:
                raise RuntimeError(
                    "a second derivative with group= is not available; take it in one process, with group=None"
                )
            found = differentiable_info_nce(ctx, x, y, ctx.temperature, grad, options.normalize, options.two_sided)
            return *found, None, None
        return (
            None if by_x is None else (by_x * grad).to(x.dtype),
            None if by_y is None else (by_y * grad).to(y.dtype),
            None if slope is None else slope * grad.to(slope.device, slope.dtype),
            None,
            None,
        )


def _evaluate(x: Tensor, y: Tensor, scale: float, options: _Options, wants: list[bool]) -> tuple[Tensor | None, ...]:
    """Value of InfoNCE and gradients by the local x and y and the logarithm of `scale`, in two passes over blocks."""
    left = RowSet("x", x, normalize=options.normalize, group=options.group)
    right = RowSet("y", y, normalize=options.normalize, group=options.group)
    if left.share != right.share:
        raise ValueError(f"x and y must be pairs on every process; found {left.share} and {right.share}")
    problem = _Problem(left, right, scale, options, with_spread=wants[2])
    row_lse, col_lse = problem.log_sums()
    total = problem.positive
    # log(1 + exp(others - own)): exact however small.
    parts = F.softplus(left.local(row_lse - total), threshold=1e9)
    if options.two_sided:
        parts = (parts + F.softplus(left.local(col_lse - total), threshold=1e9)) / 2
    value = gather_numbers(parts.sum(), options.group).sum(dim=0) / left.share.total

    grad_x, grad_y, spread = problem.gradients(row_lse, col_lse, *wants)
    for rows, unit, grad in ((left, problem.x, grad_x), (right, problem.y, grad_y)):
        if grad is not None:
            _finish(rows, unit, grad, left.share.world)
    return value, grad_x, grad_y, gather_numbers(spread, options.group).sum(dim=0) if wants[2] else None


def _finish(rows: RowSet, unit: Tensor, grad: Tensor, world: int) -> None:
    """Lead a gradient by unit rows back to the argument, and scale it for the average over processes."""
    if world == 1 and rows.inverse_norm is None:
        return
    for start in range(0, len(grad), BLOCK):
        part = slice(start, start + BLOCK)
        rows.lead_back(grad[part].mul_(world), rows.local(unit)[part], part)


class _Problem:
    """The logits of all pairs, tile by tile; the local rows of x against all of y.

    Small logits are exponentiated once for rows and columns alike; large ones relative to the largest of their row or
    column.
    """

    def __init__(self, left: RowSet, right: RowSet, scale: float, options: _Options, *, with_spread: bool):
        self.left, self.right, self.scale, self.options = left, right, scale, options
        compute = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        self._place(compute)
        reach = scale * math.prod(float(r.norm(dim=1).max()) for r in (self.x, self.y))
        if not math.isfinite(reach):
            left.check()
            right.check()
        if reach > FLOAT32_REACH and compute != wide_dtype(self.x.device):
            self._place(wide_dtype(self.x.device))
        self.plain = reach <= PLAIN_REACH and not with_spread
        count = left.share.total
        dense = options.block_size is None and count * (left.share.stop - left.share.start) <= KEPT_PAIRS
        self.block = max(count, 1) if dense else options.block_size or 1024
        self.kept: dict[tuple[int, int], Tensor] | None = {} if dense else None

    def _place(self, dtype: torch.dtype) -> None:
        self.x, self.y = self.left.rows(dtype), self.right.rows(dtype)
        wide = wide_dtype(self.x.device)
        blocks = zip(self.x.split(BLOCK), self.y.split(BLOCK), strict=True)
        self.positive = torch.cat([(a * b).sum(dim=1, dtype=wide) for a, b in blocks]) * self.scale

    def tiles(self, a: Tensor, b: Tensor, own: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Logits of rows `a`, the rows from `own` on of their set, against `b`; -inf for a pair with its own index."""
        buffer = a.new_empty(min(self.block, len(a)) * min(self.block, len(b)))
        for i in range(0, len(a), self.block):
            for j in range(0, len(b), self.block):
                rows, cols = slice(i, min(i + self.block, len(a))), slice(j, min(j + self.block, len(b)))
                shape = (rows.stop - i, cols.stop - j)
                tile = buffer[: shape[0] * shape[1]].view(shape)
                torch.addmm(tile, a[rows], b[cols].T, beta=0, alpha=self.scale, out=tile)
                self._own(tile, own + i - j, -math.inf)
                yield rows, cols, tile

    @staticmethod
    def _own(tile: Tensor, offset: int, value: float | Tensor) -> None:
        """Set the entries `(i, i + offset)`, those of a pair with itself."""
        if -tile.shape[0] < offset < tile.shape[1]:
            entries = tile.diagonal(offset)
            entries.copy_(value[: len(entries)]) if isinstance(value, Tensor) else entries.fill_(value)

    def log_sums(self) -> tuple[Tensor, Tensor | None]:
        """For every row and column of the whole problem, `log sum exp` of its logits but its partner's."""
        share, group = self.left.share, self.options.group
        a, b = self.left.local(self.x), self.y
        row = self.positive.new_full((len(a),), -math.inf)
        col = self.positive.new_full((len(b),), -math.inf) if self.options.two_sided else None
        if self.plain:
            row.fill_(0)
            col = None if col is None else col.fill_(0)
        for rows, cols, tile in self.tiles(a, b, share.start):
            if self.kept is not None:
                self.kept[rows.start, cols.start] = tile
            if self.plain:
                row[rows] += tile.exp_().sum(dim=1)
                if col is not None:
                    col[cols] += tile.sum(dim=0)
                continue
            row[rows] = torch.logaddexp(row[rows], tile.logsumexp(dim=1).to(row.dtype))
            if col is not None:
                col[cols] = torch.logaddexp(col[cols], tile.logsumexp(dim=0).to(row.dtype))
        if self.plain:
            row.log_()
            col = None if col is None else col.log_()
        row, _ = gather_rows("x", row, group)
        if col is not None:
            col = gather_numbers(col, group).logsumexp(dim=0)
        return row, col

    def gradients(
        self, row_lse: Tensor, col_lse: Tensor | None, x_grad: bool, y_grad: bool, t_grad: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The gradients by the local unit rows of x and y, and the sum of `G_ij l_ij` over the local rows."""
        alone = self.left.share.world == 1
        a, b = self.left.local(self.x), self.y
        grad_x = torch.zeros_like(a) if x_grad else None
        grad_y = torch.zeros_like(b) if y_grad and alone else None
        spread = self.positive.new_zeros(())
        if x_grad or t_grad or grad_y is not None:
            self._accumulate(a, b, (row_lse, col_lse), grad_x, grad_y, spread if t_grad else None)
        if y_grad and not alone:
            # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
            self.kept = None
            grad_y = torch.zeros_like(self.right.local(self.y))
            self._accumulate(self.right.local(self.y), self.x, (col_lse, row_lse), grad_y, None, None)
        return grad_x, grad_y, spread

    def _accumulate(self, a, b, log_sums, grad_a, grad_b, spread) -> None:
        """Add `sum_j G_ij b_j / temperature` to `grad_a`, its mirror to `grad_b`, `sum_ij G_ij l_ij` to `spread`.

        `G` is the derivative of the loss by the logits: the softmaxes over rows and columns of the whole problem, less
        one for the pair itself, so that `sum_ij G_ij l_ij` is the softmax-weighted mean of `l_ij - l_ii`.
        """
        share, positive = self.left.share, self.positive
        weight = 1 / (share.total * (2 if self.options.two_sided else 1))
        own = sum(-torch.sigmoid(lse - positive) for lse in log_sums if lse is not None)
        own = self.left.local(own).to(a.dtype)
        # As columns for the rows of `a`, as a row for those of `b`; the sums with the pair put back.
        sides = []
        for lse, shape in zip(log_sums, ((-1, 1), (1, -1)), strict=True):
            if lse is not None:
                full = torch.logaddexp(lse, positive)
                full, partner = (self.left.local(v) if shape == (-1, 1) else v for v in (full, positive))
                sides.append((full.to(a.dtype).reshape(shape), partner.to(a.dtype).reshape(shape)))

        whole = slice(0, len(a)), slice(0, len(b))
        tiles = [(*whole, self.kept[0, 0])] if self.kept else self.tiles(a, b, share.start)
        for rows, cols, tile in tiles:
            offset = share.start + rows.start - cols.start
            softmaxes = []
            parts = [rows if full.shape[1] == 1 else (slice(None), cols) for full, _ in sides]
            if self.plain:
                # exp(l_ij) (1 / sum_j exp(l_ij) + 1 / sum_i exp(l_ij)); kept tiles are exponentiated already.
                kernel = tile if self.kept else tile.exp_()
                softmaxes = [kernel.mul_(sum(torch.exp(-full[p]) for (full, _), p in zip(sides, parts, strict=True)))]
            for (full, partner), part in zip(sides, parts, strict=True) if not self.plain else ():
                softmaxes.append((tile - full[part]).exp_())
                if spread is not None:
                    gap = tile - partner[part]
                    self._own(gap, offset, 0.0)
                    spread += gap.mul_(softmaxes[-1]).sum(dtype=spread.dtype) * weight
            total = softmaxes[0] if len(softmaxes) == 1 else softmaxes[0].add_(softmaxes[1])
            self._own(total, offset, own[rows][max(0, -offset) :])
            if grad_a is not None:
                grad_a[rows].addmm_(total, b[cols], alpha=weight * self.scale)
            if grad_b is not None:
                grad_b[cols].addmm_(total.T, a[rows], alpha=weight * self.scale)
