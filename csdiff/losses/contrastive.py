"""InfoNCE: each row picks its partner out of all the rows of the other set."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csdiff.losses.arguments import check_block_size, check_finite, check_matrix, check_positive, check_same_width
from csdiff.losses.autograd import with_gradient, without_autocast
from csdiff.losses.kernels import compute_dtype, factor_dtype, fill_own, multiply, unit_rows, wide_dtype
from csdiff.losses.process_group import Share, gather_numbers, gather_rows

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
    scale = 1 / check_positive("temperature", temperature.item() if isinstance(temperature, Tensor) else temperature)
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
        factor = factor_dtype(x.device, x.dtype, y.dtype)
        logits = _Logits(*(one.to(factor or dtype) for one in rows), scale, share, block_size, group)
        if not bool(logits.positive.sum().isfinite()):
            check_finite("x", raw_x)
            check_finite("y", raw_y)
        value, grad_x, grad_y = logits.info_nce(needed[0] or any(needed[2:]), needed[1], two_sided)
        slope = None
        if any(needed[2:]):
            # The loss sees x / temperature alone, which ties the two derivatives together.
            slope = (grad_x * local[0].detach()).sum(dtype=wide_dtype(x.device)) / share.world
            slope = gather_numbers(slope, group).sum() * -scale
            slope = slope.to(temperature.device, temperature.dtype).reshape(temperature.shape)
        return value.to(dtype), [grad_x if needed[0] else None, grad_y, slope][: len(needed)]

    return with_gradient(evaluate, *local, *learned)


class _Logits:
    """The logits of all pairs, tile by tile: the local rows of x against all of y."""

    def __init__(self, x: Tensor, y: Tensor, scale: float, share: Share, block_size: int | None, group):
        self.x, self.y, self.scale, self.share, self.group = x, y, scale, share, group
        self.local = slice(share.start, share.stop)
        dtype = compute_dtype(x.dtype)
        self.positive = (x.to(dtype) * y.to(dtype)).sum(dim=1) * scale
        on_cpu = x.device.type == "cpu"
        count = share.total * (share.stop - share.start)
        self.kept: Tensor | None = None
        self.keep = block_size is None and count <= (KEPT_LOGITS if on_cpu else KEPT_LOGITS_GPU)
        self.block = share.total if self.keep else block_size or (1024 if on_cpu else 4096)

    def tiles(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Logits of the local rows `a` against all rows `b`; -inf for a pair with its own index."""
        if self.kept is not None:
            yield slice(0, len(a)), slice(0, len(b)), self.kept
            return
        buffer = self.positive.new_empty(min(self.block, len(a)) * min(self.block, len(b)))
        for i in range(0, len(a), self.block):
            for j in range(0, len(b), self.block):
                rows, cols = slice(i, min(i + self.block, len(a))), slice(j, min(j + self.block, len(b)))
                shape = (rows.stop - i, cols.stop - j)
                tile = buffer[: shape[0] * shape[1]].view(shape)
                if a.dtype == tile.dtype:
                    torch.addmm(tile, a[rows], b[cols].T, beta=0, alpha=self.scale, out=tile)
                else:
                    torch.mul(multiply(a[rows], b[cols].T), self.scale, out=tile)
                fill_own(tile, self.share.start + i - j, -math.inf)
                yield rows, cols, tile

    def info_nce(self, x_grad: bool, y_grad: bool, two_sided: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value over all processes, and the gradients by the local rows of x and y."""
        row_sums, col_sums = self.log_sums(two_sided)
        directions = (row_sums, col_sums) if two_sided else (row_sums,)
        # log(1 + exp(others - own)): exact however small or large.
        zero = self.positive.new_zeros(())
        parts = [torch.logaddexp((sums - self.positive)[self.local], zero) for sums in directions]
        total = sum(part.sum(dtype=wide_dtype(part.device)) for part in parts) / len(parts)
        total = gather_numbers(total, self.group).sum()
        alone = self.share.world == 1
        a, b = self.x[self.local], self.y
        grad_x = torch.zeros_like(a, dtype=self.positive.dtype) if x_grad else None
        grad_y = torch.zeros_like(b, dtype=self.positive.dtype) if y_grad and alone else None
        if x_grad or grad_y is not None:
            self.add_gradients(a, b, row_sums, col_sums, grad_x, grad_y)
        if y_grad and not alone:
            # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
            self.kept = None
            a, b = self.y[self.local], self.x
            grad_y = torch.zeros_like(a, dtype=self.positive.dtype)
            self.add_gradients(a, b, col_sums, row_sums, grad_y, None)
        return total / self.share.total, grad_x, grad_y

    def log_sums(self, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """For every row and column of the whole problem, `log sum exp` of its logits but its partner's."""
        a, b = self.x[self.local], self.y
        row = self.positive.new_full((len(a),), -math.inf)
        col = self.positive.new_full((len(b),), -math.inf)
        for rows, cols, tile in self.tiles(a, b):
            row[rows] = torch.logaddexp(row[rows], tile.logsumexp(dim=1))
            if two_sided:
                col[cols] = torch.logaddexp(col[cols], tile.logsumexp(dim=0))
            self.kept = tile if self.keep else None
        row, _ = gather_rows("x", row, self.group)
        return row, gather_numbers(col, self.group).logsumexp(dim=0) if two_sided else None

    def add_gradients(
        self,
        a: Tensor,
        b: Tensor,
        a_sums: Tensor | None,
        b_sums: Tensor | None,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
    ) -> None:
        """Add `sum_j G_ij b_j` to `grad_a`, and `sum_i G_ij a_i` to `grad_b`, `G` the derivative of the loss.

        `G` is the softmaxes over rows and columns of the whole problem, less one for the pair itself, where that is
        taken from the others' sum, so that it keeps its digits.
        """
        directions = [sums for sums in (a_sums, b_sums) if sums is not None]
        weight = self.scale * self.share.world / (self.share.total * len(directions))
        own = sum(-torch.sigmoid(sums - self.positive) for sums in directions)[self.local]
        a_full = None if a_sums is None else torch.logaddexp(a_sums, self.positive)[self.local]
        b_full = None if b_sums is None else torch.logaddexp(b_sums, self.positive)
        for rows, cols, tile in self.tiles(a, b):
            softmax = None if a_full is None else (tile - a_full[rows, None]).exp_()
            if b_full is not None:
                other = tile.sub_(b_full[cols]).exp_()
                softmax = other if softmax is None else softmax.add_(other)
            offset = self.share.start + rows.start - cols.start
            fill_own(softmax, offset, own[rows][max(0, -offset) :])
            softmax = softmax.mul_(weight)
            for grad, part, factor, others in ((grad_a, rows, softmax, b[cols]), (grad_b, cols, softmax.T, a[rows])):
                if grad is None:
                    continue
                if others.dtype == factor.dtype:
                    grad[part].addmm_(factor, others)
                else:
                    grad[part] += multiply(factor.to(others.dtype), others)
