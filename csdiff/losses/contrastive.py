"""InfoNCE: each row picks its partner out of all the rows of the other set."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from csdiff.losses.arguments import check_block_size, check_finite, check_number, check_sets, gather_sets
from csdiff.losses.autograd import with_gradient
from csdiff.losses.process_group import Share, gather_numbers, global_sum
from csdiff.losses.tiles import add_product, default_block, factor_dtype, tiles, wide_dtype

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
            Each process sends its rows once to each other process, `2 N_local D` elements, and one or two numbers for
            each row of all; no gradients.

    Returns:
        A scalar >= 0, float64 if an input is, else float32.

    Raises:
        ValueError: x and y of different shapes, no rows, rows that are not finite, `temperature <= 0`,
            `block_size < 1`.

    Source:
        van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018; symmetric as in
        Radford et al., "CLIP", 2021.
    """
    check_sets(x=x, y=y)
    if len(x) != len(y):
        raise ValueError(f"x and y must be pairs, with the same N; found shapes {tuple(x.shape)} and {tuple(y.shape)}")
    check_block_size(block_size)
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must have one element; found shape {tuple(temperature.shape)}")
    scale = 1 / check_number("temperature", temperature.item() if isinstance(temperature, Tensor) else temperature)
    sets = gather_sets({"x": x, "y": y}, normalize, group)
    one, other = sets.values()
    if one.share != other.share:
        raise ValueError(f"x and y must be pairs on every process; found {one.share} and {other.share}")
    learned = [temperature] if isinstance(temperature, Tensor) else []

    def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        factor, dtype = factor_dtype(x, y), one.rows.dtype
        a, b = one.rows.to(factor), other.rows.to(factor)
        own = (a.to(dtype) * b.to(dtype)).sum(dim=1) * scale
        if not math.isfinite(own.sum()):
            check_finite("x", one.given)
            check_finite("y", other.given)
        wanted = needed[0] or any(needed[2:]), needed[1]
        value, grad_x, grad_y = _two_passes(a, b, own, scale, one.share, two_sided, wanted, block_size, group)
        slope = None
        if any(needed[2:]):
            # The loss sees x / temperature alone, which ties the two derivatives together.
            slope = (grad_x * one.local).sum(dtype=wide_dtype(x.device)) / one.share.world
            slope = global_sum(slope, group) * -scale
            slope = slope.to(temperature.device, temperature.dtype).reshape(temperature.shape)
        return value, [grad_x if needed[0] else None, grad_y, slope][: len(needed)]

    return with_gradient(evaluate, one.local, other.local, *learned)


def _two_passes(
    x: Tensor, y: Tensor, own: Tensor, scale: float, share: Share, two_sided: bool, wanted, block_size, group
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss over all processes, and its gradients by the local rows of x and y where they are wanted.

    x and y are the rows of all processes and `own` the logits of their pairs. A process meets its rows of x with all
    of y; all that it keeps of the logits is, for each row and each column, the log sum exp of those off the diagonal.
    """
    mine = slice(share.start, share.stop)
    limit = KEPT_LOGITS if x.device.type == "cpu" else KEPT_LOGITS_GPU
    keep = block_size is None and share.total * (share.stop - share.start) <= limit
    block = share.total if keep else block_size or default_block(x.device)

    def logits(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        return tiles(a[mine], b, scale=scale, block=block, own=share.start)

    kept = list(logits(x, y)) if keep else None
    # Of rows and, if two-sided, of columns; a row that another process holds stays at -inf.
    others = own.new_full((1 + two_sided, share.total), -math.inf)
    for rows, cols, tile in kept or logits(x, y):
        row, col = others[0, mine][rows], others[-1, cols]
        torch.logaddexp(row, tile.logsumexp(dim=1), out=row)
        if two_sided:
            torch.logaddexp(col, tile.logsumexp(dim=0), out=col)
    if group is not None:
        others = gather_numbers(others, group).logsumexp(dim=0)
    gap = others - own
    # log(1 + exp(others - own)): exact however small or large.
    value = F.softplus(gap, threshold=50).mean(dtype=wide_dtype(gap.device)).to(own.dtype)
    if not any(wanted):
        return value, None, None
    sums = torch.logaddexp(others, own)
    if not two_sided:
        # No column has a softmax.
        sums = torch.cat([sums, torch.full_like(sums, math.inf)])
    weight = scale * share.world / gap.numel()
    # The pair itself: its softmaxes, less one, are taken from the others' sum, so that they keep their digits.
    slopes = (torch.sigmoid(gap).sum(dim=0) * -weight)[:, None]

    def pulls(found, a: Tensor, b: Tensor, sums: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
        """`sum_j G_ij b_j` of the local rows of a and, if both, `sum_i G_ij a_i` of all of b.

        `G`, the derivative by the logits, is the softmaxes over rows and columns of the whole problem, less one for
        the pair itself.
        """
        a_sums, b_sums = sums[0, mine, None], sums[1]
        grad_a = slopes[mine] * b[mine]
        grad_b = slopes * a if both else None
        for rows, cols, tile in found:
            softmax = (tile - a_sums[rows]).exp_().add_(tile.sub_(b_sums[cols]).exp_())
            add_product(grad_a[rows], softmax, b[cols], weight)
            if both:
                add_product(grad_b[cols], softmax.T, a[rows], weight)
        return grad_a, grad_b

    grad_x = grad_y = None
    if wanted[0]:
        grad_x, grad_y = pulls(kept or logits(x, y), x, y, sums, both=wanted[1] and share.world == 1)
    if wanted[1] and grad_y is None:
        # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
        grad_y, _ = pulls(logits(y, x), y, x, sums.flip(0), both=False)
    return value, grad_x, grad_y
