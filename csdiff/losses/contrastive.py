"""InfoNCE: each row picks its partner out of all the rows of the other set."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from csdiff.losses.arguments import check_block_size, check_finite, check_number, check_sets
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
    check_sets(x=x, y=y)
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
        a, b = (one.to(factor_dtype(x, y)) for one in rows)
        own = (a.to(dtype) * b.to(dtype)).sum(dim=1) * scale
        if not math.isfinite(own.sum()):
            check_finite("x", raw_x)
            check_finite("y", raw_y)
        wanted = needed[0] or any(needed[2:]), needed[1]
        value, grad_x, grad_y = _two_passes(a, b, own, scale, share, two_sided, wanted, block_size, group)
        slope = None
        if any(needed[2:]):
            # The loss sees x / temperature alone, which ties the two derivatives together.
            slope = (grad_x * local[0].detach()).sum(dtype=wide_dtype(x.device)) / share.world
            slope = gather_numbers(slope, group).sum() * -scale
            slope = slope.to(temperature.device, temperature.dtype).reshape(temperature.shape)
        return value.to(dtype), [grad_x if needed[0] else None, grad_y, slope][: len(needed)]

    return with_gradient(evaluate, *local, *learned)


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
    row, col = torch.full_like(own[mine], -math.inf), torch.full_like(own, -math.inf)
    for rows, cols, tile in kept or logits(x, y):
        row[rows] = torch.logaddexp(row[rows], tile.logsumexp(dim=1))
        if two_sided:
            col[cols] = torch.logaddexp(col[cols], tile.logsumexp(dim=0))
    others = [gather_rows("x", row, group)[0]]
    if two_sided:
        others.append(gather_numbers(col, group).logsumexp(dim=0))
    # log(1 + exp(others - own)): exact however small or large.
    losses = [F.softplus(one - own, threshold=50) for one in others]
    value = sum(loss.sum(dtype=wide_dtype(loss.device)) for loss in losses) / (len(losses) * share.total)
    if not any(wanted):
        return value, None, None
    sums = [torch.logaddexp(one, own) for one in others]
    if not two_sided:
        # No column has a softmax.
        sums.append(torch.full_like(own, math.inf))
    slopes = -sum(torch.sigmoid(one - own) for one in others)[mine]
    weight = scale * share.world / (share.total * len(others))

    def pulls(found, a: Tensor, b: Tensor, a_sums: Tensor, b_sums: Tensor, both: bool):
        """`sum_j G_ij b_j` of the local rows of a and, if both, `sum_i G_ij a_i` of all of b.

        `G`, the derivative by the logits, is the softmaxes over rows and columns of the whole problem, less one for
        the pair itself, where that is taken from the others' sum, so that it keeps its digits.
        """
        a, a_sums = a[mine], a_sums[mine]
        grad_a = torch.zeros_like(a, dtype=own.dtype)
        grad_b = torch.zeros_like(b, dtype=own.dtype) if both else None
        for rows, cols, tile in found:
            softmax = (tile - a_sums[rows, None]).exp_().add_(tile.sub_(b_sums[cols]).exp_())
            offset = share.start + rows.start - cols.start
            fill_own(softmax, offset, slopes[rows][max(0, -offset) :])
            add_product(grad_a[rows], softmax, b[cols], weight)
            if both:
                add_product(grad_b[cols], softmax.T, a[rows], weight)
        return grad_a, grad_b

    grad_x = grad_y = None
    if wanted[0]:
        grad_x, grad_y = pulls(kept or logits(x, y), x, y, *sums, both=wanted[1] and share.world == 1)
    if wanted[1] and grad_y is None:
        # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
        grad_y, _ = pulls(logits(y, x), y, x, *reversed(sums), both=False)
    return value, grad_x, grad_y
