"""Small sets, whose pairs are evaluated all at once in as few operations as keep the digits.

At some hundreds of rows it is the number of operations that takes the time, not their size. What is not plain (points
nearly alike, kernels nearly 0 or nearly 1, logits out of the reach of exp) is left to the blocks: the answer is None.
"""

import math

import torch
from torch import Tensor

from .arguments import without_autocast
from .bandwidth import as_widths
from .dense import differentiable_info_nce
from .kernel_sums import NEAR
from .kernel_terms import (
    FLOAT32_REACH,
    NEARLY_EQUAL,
    NEARLY_PARALLEL,
    SMALL_EXPONENT,
    KernelOptions,
    differentiable_backward,
)
from .products import bfloat16_is_faster
from .row_set import wide_dtype

# Rows of both sets together up to which one square of all their pairs is faster than three.
KERNEL_ROWS = 512
# Multiplications of that square up to which float64 costs nothing beside the calls.
FREE_IN_FLOAT64 = 2**20
# Pairs up to which InfoNCE is taken here.
CONTRAST_ROWS = 1024
# Logits up to this can be exponentiated as they are.
PLAIN_REACH = 60.0
# Row lengths whose inverse and square float32 holds.
SHORT, LONG = 1e-15, 1e15


def small_divergence(x: Tensor, y: Tensor, options: KernelOptions, within_y: float | None) -> Tensor | None:
    """The divergence of checked matrices with one kernel width, differentiable; None where it is not plain."""
    n, m = len(x), len(y)
    least = 1 if options.diagonal else 2
    if n + m > KERNEL_ROWS or n < least or m < least or isinstance(options.bandwidth, str):
        return None
    widths = as_widths(options.bandwidth)
    if options.group is not None or options.block_size is not None or len(widths) > 1 or not _fits(x, y):
        return None
    wants = [torch.is_grad_enabled() and rows.requires_grad for rows in (x, y)]
    found = _kernel_square(x.detach(), y.detach(), widths[0], options, within_y, wants)
    if found is None:
        return None
    value, gradients = found
    return _SmallDivergence.apply(x, y, value, *gradients, options, widths, within_y is None)


def _fits(x: Tensor, y: Tensor) -> bool:
    if wide_dtype(x.device) != torch.float64:
        return False
    return not (x.dtype == y.dtype == torch.bfloat16 and bfloat16_is_faster(x.device))


class _SmallDivergence(torch.autograd.Function):
    """A value whose gradients came with it."""

    @staticmethod
    def forward(ctx, x, y, value, grad_x, grad_y, options, widths, with_yy):
        ctx.options, ctx.widths, ctx.wanted = options, widths, (True, with_yy, True)
        ctx.save_for_backward(x, y, grad_x, grad_y)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        x, y, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = differentiable_backward(ctx, x, y, (grad, grad, -2 * grad))
        else:
            found = (None if g is None else g * grad for g in gradients)
        return *found, *[None] * 6


def _kernel_square(x, y, width: float, options: KernelOptions, within_y: float | None, wants: list[bool]):
    """Value and gradients from the square of the kernels between all rows of both sets."""
    n, m = len(x), len(y)
    result = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    dtype = torch.float64 if (n + m) ** 2 * x.shape[1] <= FREE_IN_FLOAT64 else result
    rows = torch.cat([x, y]).to(dtype)
    if options.normalize:
        inverse = _invert_lengths(rows)
        if inverse is None:
            return None
        rows.mul_(inverse)
    points = rows - rows.mean(dim=0)
    square = (points * points).sum(dim=1)
    base, largest = 1 / (2 * width**2), float(square.max())
    # A number that is not finite fails here as well.
    if not SMALL_EXPONENT / 4 < base * largest < FLOAT32_REACH:
        return None
    if dtype == torch.float32 and options.normalize and largest < NEARLY_PARALLEL:
        return None
    square.mul_(-base)
    kernel = torch.addmm(square, points, points.T, alpha=2 * base).add_(square[:, None]).fill_diagonal_(-math.inf)
    if dtype == torch.float32 and float(kernel.max()) > -base * NEAR * largest:
        return None
    kernel.exp_()

    xx, xy, yx, yy = kernel[:n, :n], kernel[:n, n:], kernel[n:, :n], kernel[n:, n:]
    own = (n, m) if options.diagonal else (0, 0)
    sum_xx, sum_xy = float(xx.sum(dtype=torch.float64)) + own[0], float(xy.sum(dtype=torch.float64))
    value = math.log(sum_xx / (n * (n - 1) + own[0])) - 2 * math.log(sum_xy / (n * m))
    if within_y is None:
        sum_yy = float(yy.sum(dtype=torch.float64)) + own[1]
        value += math.log(sum_yy / (m * (m - 1) + own[1]))
    else:
        value += within_y
    if dtype == torch.float32 and abs(value) < NEARLY_EQUAL:
        return None
    if options.diagonal:
        value = max(value, 0.0)
    value = torch.tensor(value, dtype=result, device=x.device)
    if not any(wants):
        return value, (None, None)

    # Derivative of the value by the exponents, up to a sign: the weights of the pull of each row on each other one.
    sides = slice(0 if wants[0] else n, n + m if wants[1] else n)
    if wants[0]:
        xx.mul_(4 * base / sum_xx)
        xy.mul_(-4 * base / sum_xy)
    if wants[1]:
        yy.mul_(4 * base / sum_yy)
        yx.mul_(-4 * base / sum_xy)
    weight = kernel[sides]
    grad = (weight @ points).addcmul_(points[sides], weight.sum(dim=1, keepdim=True), value=-1)
    if options.normalize:
        _lead_back(grad, rows[sides], inverse[sides])
    grad_x = grad[:n].to(x.dtype) if wants[0] else None
    return value, (grad_x, grad[-m:].to(y.dtype) if wants[1] else None)


def small_info_nce(
    x: Tensor, y: Tensor, temperature: Tensor | float, two_sided: bool, normalize: bool
) -> Tensor | None:
    """InfoNCE of checked pairs, differentiable; None where it is not plain."""
    if not 1 < len(x) <= CONTRAST_ROWS or not _fits(x, y):
        return None
    scale = 1 / (temperature.item() if isinstance(temperature, Tensor) else temperature)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    units, inverses, reach = [x.detach().to(dtype), y.detach().to(dtype)], [None, None], scale
    if normalize:
        inverses = [_invert_lengths(rows) for rows in units]
        if inverses[0] is None or inverses[1] is None:
            return None
        units = [rows * inverse for rows, inverse in zip(units, inverses, strict=True)]
    else:
        # Of the lengths, not of the logits: products that cancel have lost their digits.
        reach *= math.prod(float(torch.linalg.vector_norm(rows, dim=1).max()) for rows in units)
    # A number that is not finite fails here as well.
    if not reach < PLAIN_REACH:
        return None
    return _SmallInfoNCE.apply(x, y, temperature, units, inverses, scale, two_sided, torch.is_grad_enabled())


class _SmallInfoNCE(torch.autograd.Function):
    """The logits are kept, and the gradient multiplied out when it is asked for."""

    @staticmethod
    def forward(ctx, x, y, temperature, units, inverses, scale, two_sided, with_gradient):
        logits = torch.addmm(units[0].new_empty(1), units[0], units[1].T, beta=0, alpha=scale)
        positive = logits.diagonal().clone()
        by_temperature = ctx.needs_input_grad[2]
        kernel = logits.exp() if by_temperature else logits.exp_()
        diagonal = kernel.diagonal()
        diagonal.zero_()
        # The sums over a row (and column) without the pair itself: log(1 + others / own) is exact however small.
        others = torch.stack([kernel.sum(dim=side) for side in ((1, 0) if two_sided else (1,))])
        own = positive.exp()
        value = torch.log1p(others / own).mean()
        if not (with_gradient and any(ctx.needs_input_grad)):
            return value
        # From here on `kernel` is the derivative of the value by the products of the rows.
        share = (others + own).reciprocal_().mul_(scale / others.numel())
        kernel.mul_(share[0, :, None] + share[1] if two_sided else share[0, :, None])
        torch.sum(others.mul_(share).neg_(), dim=0, out=diagonal)
        slope = None
        if by_temperature:
            # The weights of a row sum to zero: what all logits share is left out, to keep the digits of the rest.
            slope = -logits.sub_(positive.mean()).mul_(kernel).sum(dtype=torch.float64)
            slope = slope.to(temperature.device, temperature.dtype).reshape(temperature.shape)
        ctx.temperature, ctx.normalize, ctx.two_sided = temperature, inverses[0] is not None, two_sided
        ctx.save_for_backward(x, y, kernel, slope, *units, *inverses)
        return value

    @staticmethod
    def backward(ctx, grad):
        x, y, kernel, slope, a, b, *inverses = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = differentiable_info_nce(ctx, x, y, ctx.temperature, grad, ctx.normalize, ctx.two_sided)
            return *found, *[None] * 5
        found = [None, None]
        # Backward may be called inside autocast.
        with without_autocast(x.device):
            for i, (pull, rows) in enumerate(((kernel, b), (kernel.T, a))):
                if needs[i]:
                    found[i] = torch.mm(pull, rows).mul_(grad)
                    if ctx.normalize:
                        _lead_back(found[i], (a, b)[i], inverses[i])
                    found[i] = found[i].to((x, y)[i].dtype)
        by_temperature = slope * grad.to(slope.device, slope.dtype) if needs[2] else None
        return *found, by_temperature, *[None] * 5


def _invert_lengths(rows: Tensor) -> Tensor | None:
    """`1 / |row|` as a column; None if a length is zero, not finite, or out of range."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    shortest, longest = (float(end) for end in length.aminmax())
    return length.reciprocal_() if shortest > SHORT and longest < LONG else None


def _lead_back(grad: Tensor, unit: Tensor, inverse: Tensor) -> None:
    """Turn a gradient by unit rows into one by the rows as given, in place."""
    grad.addcmul_(unit, (grad * unit).sum(dim=1, keepdim=True), value=-1).mul_(inverse)
