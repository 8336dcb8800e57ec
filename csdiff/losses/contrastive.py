"""InfoNCE: each row picks its partner out of all the rows of the other set."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from csdiff.losses.arguments import check_block_size, check_finite, check_matrix, check_number, check_same_width
from csdiff.losses.autograd import with_gradient, without_autocast
from csdiff.losses.process_group import Share, gather_numbers, gather_rows
from csdiff.losses.tiles import (
    add_product,
    compute_dtype,
    default_block,
    factor_dtype,
    fill_own,
    tiles,
    unit_rows,
    wide_dtype,
)

# Up to this many logits are kept between the two passes, which saves a product: 64 MB, on a GPU 256 MB.
KEPT_LOGITS, KEPT_LOGITS_GPU = 2**24, 2**26


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
    `N x N` matrix is kept (up to 4096 rows, 8192 on a GPU, with `block_size=None` it is: that saves a product). The
    pair itself is left out of the log sums and put back exactly, so losses far below 1 keep their digits, and that of
    a single pair is 0. There is no second derivative: `create_graph=True` raises RuntimeError.

    Precision: float32 holds logits to 1e-7 of their size, so that the loss loses digits where logits reach thousands
    (rows that are not of unit length, a temperature below 0.001): pass float64 there.

    Args:
        x: `(N, D)` rows, any floating dtype. float16 is computed in float32, and so is bfloat16 but for the products
            on a GPU, which take bfloat16 factors and float32 sums. The logits are plain products of the rows: pass
            unit rows, or `normalize=True`, for cosines.
        y: `(N, D)` rows, the partners.
        temperature: a number > 0, or a tensor with one element, which may require a gradient.
        two_sided: False leaves `R` alone: x picks among y.
        normalize: divide each row by its length first; a zero row stays zero.
        block_size: rows and columns evaluated at once; None lets the size decide. The result does not depend on it.
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
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must have one element; found shape {tuple(temperature.shape)}")
    scale = 1 / check_number("temperature", temperature.item() if isinstance(temperature, Tensor) else temperature)
    dtype = compute_dtype(x.dtype, y.dtype)
    prepare = unit_rows if normalize else Tensor.to
    with without_autocast(x.device):
        local = [prepare(rows, dtype) for rows in (x, y)]
    learned = [temperature] if isinstance(temperature, Tensor) else []

    def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        (raw_x, share), (raw_y, other) = gather_rows("x", x, group), gather_rows("y", y, group)
        if share != other:
            raise ValueError(f"x and y must be pairs on every process; found {share} and {other}")
        if share.total == 0:
            raise ValueError(f"x must have at least one row; found shape {tuple(x.shape)} (N = 0)")
        rows = [one.detach() for one in local] if group is None else [prepare(raw, dtype) for raw in (raw_x, raw_y)]
        pairs = _Pairs(*(one.to(factor_dtype(x, y)) for one in rows), scale, share, block_size, group)
        if not math.isfinite(pairs.logits.sum()):
            check_finite("x", raw_x)
            check_finite("y", raw_y)
        value = pairs.value(two_sided)
        grad_x, grad_y = pairs.gradients(needed[0] or any(needed[2:]), needed[1])
        slope = None
        if any(needed[2:]):
            # The loss sees x / temperature alone, which ties the two derivatives together.
            slope = (grad_x * local[0].detach()).sum(dtype=wide_dtype(x.device)) / share.world
            slope = gather_numbers(slope, group).sum() * -scale
            slope = slope.to(temperature.device, temperature.dtype).reshape(temperature.shape)
        return value.to(dtype), [grad_x if needed[0] else None, grad_y, slope][: len(needed)]

    return with_gradient(evaluate, *local, *learned)


class _Pairs:
    """The pairs of all processes, of which this one holds a share: its rows of x against all of y, or the reverse.

    For each pair: `logits`, its own; `sums`, for its row and where wanted its column, the log sum exp of all others.
    """

    sums: list[Tensor]

    def __init__(self, x: Tensor, y: Tensor, scale: float, share: Share, block_size: int | None, group):
        self.x, self.y, self.scale, self.share, self.group = x, y, scale, share, group
        self.local = slice(share.start, share.stop)
        self.dtype = compute_dtype(x.dtype)
        self.logits = (x.to(self.dtype) * y.to(self.dtype)).sum(dim=1) * scale
        limit = KEPT_LOGITS if x.device.type == "cpu" else KEPT_LOGITS_GPU
        self.keep = block_size is None and share.total * (share.stop - share.start) <= limit
        self.block = share.total if self.keep else block_size or default_block(x.device)
        self.kept: list[tuple[slice, slice, Tensor]] = []

    def tiles(self, a: Tensor, b: Tensor) -> Iterable[tuple[slice, slice, Tensor]]:
        return tiles(a, b, scale=self.scale, block=self.block, own=self.share.start)

    def value(self, two_sided: bool) -> Tensor:
        """The loss over all processes."""
        a, b = self.x[self.local], self.y
        row = self.logits.new_full((len(a),), -math.inf)
        col = self.logits.new_full((len(b),), -math.inf)
        for rows, cols, tile in self.tiles(a, b):
            row[rows] = torch.logaddexp(row[rows], tile.logsumexp(dim=1))
            if two_sided:
                col[cols] = torch.logaddexp(col[cols], tile.logsumexp(dim=0))
            self.kept = [(rows, cols, tile)] if self.keep else []
        self.sums = [gather_rows("x", row, self.group)[0]]
        if two_sided:
            self.sums.append(gather_numbers(col, self.group).logsumexp(dim=0))
        # log(1 + exp(others - own)): exact however small or large.
        losses = [F.softplus(others - self.logits, threshold=50) for others in self.sums]
        total = sum(loss.sum(dtype=wide_dtype(loss.device)) for loss in losses)
        return total / (len(losses) * self.share.total)

    def gradients(self, x: bool, y: bool) -> tuple[Tensor | None, Tensor | None]:
        """Those by the local rows of x and y that are wanted."""
        full = [torch.logaddexp(others, self.logits) for others in self.sums]
        rows, cols = full[0], full[1] if len(full) == 2 else None
        alone = self.share.world == 1
        found = self._pulls(self.x, self.y, rows, cols, x, y and alone) if x or (y and alone) else (None, None)
        if not y or alone:
            return found
        # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
        self.kept = []
        return found[0], self._pulls(self.y, self.x, cols, rows, True, False)[0]

    def _pulls(
        self, a: Tensor, b: Tensor, a_sums: Tensor | None, b_sums: Tensor | None, a_wanted: bool, b_wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """`sum_j G_ij b_j` of the local rows of `a` and `sum_i G_ij a_i`, `G` the derivative of the loss by logits.

        `G` is the softmaxes over rows and columns of the whole problem, less one for the pair itself, where that is
        taken from the others' sum, so that it keeps its digits.
        """
        a = a[self.local]
        grad_a = torch.zeros_like(a, dtype=self.dtype) if a_wanted else None
        grad_b = torch.zeros_like(b, dtype=self.dtype) if b_wanted else None
        weight = self.scale * self.share.world / (self.share.total * len(self.sums))
        own = -sum(torch.sigmoid(others - self.logits) for others in self.sums)[self.local]
        for rows, cols, tile in self.kept or self.tiles(a, b):
            softmax = None if a_sums is None else (tile - a_sums[self.local][rows, None]).exp_()
            if b_sums is not None:
                other = tile.sub_(b_sums[cols]).exp_()
                softmax = other if softmax is None else softmax.add_(other)
            offset = self.share.start + rows.start - cols.start
            fill_own(softmax, offset, own[rows][max(0, -offset) :])
            if grad_a is not None:
                add_product(grad_a[rows], softmax, b[cols], weight)
            if grad_b is not None:
                add_product(grad_b[cols], softmax.T, a[rows], weight)
        return grad_a, grad_b
