"""The logarithms of the mean kernel within and between two sets, with their gradients, each pair visited once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_block_size, check_matrix, check_same_width, without_autocast
from .bandwidth import Bandwidth, check_bandwidth, resolve_bandwidth
from .dense import dense_log_mean_kernel, unit_rows
from .kernel_sums import KernelTiles, PairSums, Points, kernel_sums
from .process_group import gather_numbers
from .products import Products, bfloat16_is_faster
from .row_set import BLOCK, RowSet, squared_norms, wide_dtype

# `s R^2`, the exponent at the radius of the points, above which rounding in float32 shows in the fifth digit.
FLOAT32_REACH = 20.0
# Below this exponent `exp(.) - 1` is summed in place of `exp(.)`.
SMALL_EXPONENT = 0.3
# A divergence below this is the difference of nearly equal logarithms; where there are few pairs to average the
# rounding of float32 out, it is taken again in float64.
NEARLY_EQUAL, FEW_PAIRS = 3e-4, 2**21
# Unit rows within this squared radius lose digits of their distances if they are rounded before they are centred.
NEARLY_PARALLEL = 1e-2
# Above this `s R^2` the rounding of bfloat16 factors would change the kernel by more than that of the inputs.
BFLOAT16_REACH = 8.0


@dataclass(frozen=True)
class KernelOptions:
    """How the mean kernel is taken; see `cauchy_schwarz_divergence`."""

    bandwidth: Bandwidth
    diagonal: bool = True
    normalize: bool = False
    block_size: int | None = None
    group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self):
        check_bandwidth(self.bandwidth)
        check_block_size(self.block_size)


def log_mean_kernels(
    x: Tensor,
    y: Tensor | None,
    options: KernelOptions,
    *,
    xx: bool = True,
    yy: bool | float = True,
    xy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`log V(x, x)`, `log V(y, y)`, `log V(x, y)` as float64 scalars; those not asked for are 0 and cost nothing.

    A number for `yy` is the value of that term, known from before, and is returned.
    """
    check_matrix("x", x)
    if y is not None:
        check_matrix("y", y)
        check_same_width(x, y)
    with without_autocast(x.device):
        return _LogMeanKernels.apply(x, y, options, (xx, yy, xy and y is not None), torch.is_grad_enabled())


class _PointSet(RowSet):
    """Rows as the kernel sums take them: moved so that the origin lies between the two sets."""

    points: Points

    def place(self, rows: Tensor, centre: Tensor) -> None:
        """Take `rows - centre` as the points."""
        rows = rows - centre if rows.data_ptr() == self.raw.data_ptr() else rows.sub_(centre)
        self.points = Points(rows, squared_norms(rows))

    def local_points(self) -> Points:
        return self.points.slice(self.share.start, self.share.stop)

    def gradient(self, weight: Tensor, mix: Tensor, scale: float, centre: Tensor) -> Tensor:
        """`scale (mix_i - weight_i a_i)` for the local rows, led back to the argument; overwrites `mix`."""
        local = self.local_points()
        for start in range(0, len(local), BLOCK):
            part = slice(start, start + BLOCK)
            rows, grad = local.rows[part].to(mix.dtype), mix[part]
            grad.addcmul_(rows, weight[part, None].to(mix.dtype), value=-1).mul_(scale)
            self.lead_back(grad, rows + centre, part)
        # Few rows keep their float64: the terms may cancel when they are added up.
        return mix if len(mix) <= BLOCK else mix.to(torch.promote_types(self.dtype, torch.float32))


class _LogMeanKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, options, wanted, with_gradient):
        xx, yy, xy = wanted
        x_grad, y_grad = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        named = [(name, rows) for name, rows in (("x", x), ("y", y)) if rows is not None]
        sets = [_PointSet(name, r, normalize=options.normalize, group=options.group) for name, r in named]
        left, right = sets[0], sets[-1]
        for name, one, used in (("x", left, xx), ("y", right, yy)):
            if used is True and not options.diagonal and one.share.total == 1:
                raise ValueError(f"diagonal=False needs at least two rows in {name}; found N = 1")

        def evaluate(exact: bool):
            tiles, centre, widths = _place(sets, options, exact)
            block = options.block_size or _block_size(left, right)
            values, gradients = [zero, zero, zero], [None, None, None, None]
            with tiles.products.active():
                for slot, one, used, grad in ((0, left, xx, x_grad), (1, right, yy is True, y_grad)):
                    if used:
                        values[slot], gradients[slot] = _within(one, tiles, centre, block, grad, options)
                if xy:
                    values[2], gradients[2:] = _between(left, right, tiles, centre, block, (x_grad, y_grad), options)
            return values, gradients, tiles, widths

        zero = torch.zeros((), dtype=wide_dtype(x.device), device=x.device)
        values, gradients, tiles, widths = evaluate(exact=False)
        if not isinstance(yy, bool):
            values[1] = zero + yy
        crowded = bool(gather_numbers(zero + tiles.crowded, options.group).any())
        few = left.share.total * right.share.total <= FEW_PAIRS and not tiles.small and tiles.dtype != zero.dtype
        few = few and xx and xy and yy is not False
        if crowded or (few and abs(values[0] + values[1] - 2 * values[2]) < NEARLY_EQUAL):
            computed, gradients, tiles, widths = evaluate(exact=True)
            values = [computed[0], computed[1] if yy is True else values[1], computed[2]]
        ctx.options, ctx.widths, ctx.wanted = options, widths, wanted
        ctx.save_for_backward(x, y, *gradients)
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        x, y, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_backward(ctx, x, y, grads), None, None, None
        g_xx, g_yy, g_xy = grads
        grad_x = _weighted_sum(x, (gradients[0], g_xx), (gradients[2], g_xy))
        grad_y = _weighted_sum(y, (gradients[1], g_yy), (gradients[3], g_xy))
        return grad_x, grad_y, None, None, None


def _weighted_sum(like: Tensor | None, *parts: tuple[Tensor | None, Tensor]) -> Tensor | None:
    total = None
    for gradient, weight in parts:
        if gradient is not None:
            weight = weight.to(gradient.dtype)
            total = gradient * weight if total is None else total.addcmul_(gradient, weight)
    return total if total is None else total.to(like.dtype)


def differentiable_backward(ctx, x: Tensor, y: Tensor | None, grads) -> tuple[Tensor | None, Tensor | None]:
    """The gradient as a function that can be differentiated again (`create_graph=True`), by the dense formula."""
    options = ctx.options
    if options.group is not None:
        raise RuntimeError("a second derivative with group= is not available; take it in one process, with group=None")
    with torch.enable_grad():
        a = unit_rows(x.double()) if options.normalize else x
        b = None if y is None else unit_rows(y.double()) if options.normalize else y
        pairs = ((a, None, options.diagonal), (b, None, options.diagonal), (a, b, True))
        total = sum(
            grad * dense_log_mean_kernel(p, q, ctx.widths, diagonal=diagonal)
            for wanted, grad, (p, q, diagonal) in zip(ctx.wanted, grads, pairs, strict=True)
            if wanted is True
        )
        inputs = [t for t, needed in zip((x, y), ctx.needs_input_grad, strict=False) if needed]
        found = list(torch.autograd.grad(total, inputs, create_graph=True))
    return tuple(found.pop(0) if needed else None for needed in ctx.needs_input_grad[:2])


def _place(
    sets: list[_PointSet], options: KernelOptions, exact: bool
) -> tuple[KernelTiles, Tensor, tuple[float, ...]]:
    """Centre the sets, and choose the arithmetic that keeps five digits in float32 and ten in float64.

    With `exact` it is float64.

    Distances do not change when both sets are moved, and `||a||^2 + ||b||^2 - 2 a.b` loses digits with the distance of
    the rows from the origin: so the origin goes between the two sets.
    """
    device = sets[0].raw.device
    given = torch.float32
    for one in sets:
        given = torch.promote_types(given, one.dtype)
    half = not exact and all(one.dtype == torch.bfloat16 for one in sets) and bfloat16_is_faster(device)
    wide = wide_dtype(device)

    def place(dtype: torch.dtype) -> tuple[Tensor, float]:
        rows = [one.rows(dtype) for one in sets]
        centre = sum(r.mean(dim=0) for r in rows) / len(rows)
        for r, one in zip(rows, sets, strict=True):
            one.place(r, centre)
        # A bad number anywhere shows in the centred norms, which are needed anyway.
        if not all(math.isfinite(float(one.points.square.sum())) for one in sets):
            for one in sets:
                one.check()
        return centre, max(float(one.points.square.max()) for one in sets)

    compute = wide if exact else given
    centre, largest = place(compute)
    if options.normalize and compute != wide and largest < NEARLY_PARALLEL:
        centre, largest = place(wide)
        centre = centre.to(compute)
        for one in sets:
            one.points = Points(one.points.rows.to(compute), one.points.square)
    widths = resolve_bandwidth(options.bandwidth, *(one.points.rows for one in sets))
    scale = 1 / (2 * widths[0] ** 2)
    if scale * largest > FLOAT32_REACH and compute != wide:
        compute = wide
        centre, largest = place(compute)
    reach = scale * largest
    products = Products(device, bfloat16=half and reach <= BFLOAT16_REACH)
    for one in sets:
        factor = products.factor(one.points.rows)
        square = squared_norms(factor) if products.bfloat16 else one.points.square
        one.points = Points(factor, square.to(compute))
    radius = math.sqrt(reach / scale)
    direct = direct_differences(reach, compute, given)
    return (
        KernelTiles(widths, products, compute, radius, small=4 * reach < SMALL_EXPONENT, direct=direct),
        centre,
        widths,
    )


def direct_differences(reach: float, compute: torch.dtype, given: torch.dtype) -> bool:
    """Whether expanded squares would cost exponents in float64 more digits than the inputs can show."""
    lost = 4 * reach * torch.finfo(torch.float64).eps
    return compute == torch.float64 and lost > (1e-11 if given == torch.float64 else 1e-6)


def _block_size(left: _PointSet, right: _PointSet) -> int:
    """One tile while it is small, else blocks that stay in the caches of a processor or fill a GPU."""
    longest = max(left.share.total, right.share.total)
    if left.raw.device.type == "cpu":
        return longest if longest <= 1024 else 1024
    return longest if longest <= 4096 else 4096


def _within(one: _PointSet, tiles, centre, block, grad: bool, options: KernelOptions) -> tuple[Tensor, Tensor | None]:
    own = 0.0 if options.diagonal else -math.inf
    sums = kernel_sums(
        one.local_points(), one.points, tiles, block=block, row_gradient=grad, own=one.share.start, floor=own
    )
    count = one.share.total
    # A point's pair with itself has kernel 1 and no gradient: it is added here, exactly.
    value, whole = _log_mean(
        sums, count * (count if options.diagonal else count - 1), options, count if own == 0 else 0
    )
    if not grad:
        return value, None
    # Each row appears on both sides of a pair: twice the derivative by one side.
    scale = 4 * tiles.base * one.share.world * _share_of(sums, whole)
    return value, one.gradient(sums.row_weight, sums.row_mix, scale, centre)


def _between(
    left: _PointSet, right: _PointSet, tiles, centre, block, grads: tuple[bool, bool], options: KernelOptions
):
    x_grad, y_grad = grads
    alone = left.share.world == 1
    sums = kernel_sums(
        left.local_points(), right.points, tiles, block=block, row_gradient=x_grad, col_gradient=y_grad and alone
    )
    value, whole = _log_mean(sums, left.share.total * right.share.total, options)
    scale = 2 * tiles.base * left.share.world
    gradients = [None, None]
    if x_grad:
        factor = scale * _share_of(sums, whole)
        gradients[0] = left.gradient(sums.row_weight, sums.row_mix, factor, centre)
    if y_grad and alone:
        factor = scale * _share_of(sums, whole)
        gradients[1] = right.gradient(sums.col_weight, sums.col_mix, factor, centre)
    elif y_grad:
        # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
        sums = kernel_sums(right.local_points(), left.points, tiles, block=block, row_gradient=True)
        factor = scale * _share_of(sums, whole)
        gradients[1] = right.gradient(sums.row_weight, sums.row_mix, factor, centre)
    return value, gradients


def _log_mean(sums: PairSums, count: int, options: KernelOptions, ones: int = 0) -> tuple[Tensor, tuple[float, float]]:
    """Log of the mean over the pairs of all processes and `ones` pairs of kernel 1; and their sum and its shift."""
    shares = gather_numbers(torch.stack([sums.total, sums.total.new_tensor(sums.shift)]), options.group)
    if sums.small:
        total = shares[:, 0].sum()
        return torch.log1p(total / count), (float(total) + count, 0.0)
    parts = [(total, shift) for total, shift in [*shares.tolist(), (float(ones), 0.0)] if total > 0]
    shift = max(shift for _, shift in parts)
    total = sum(part * math.exp(its_shift - shift) for part, its_shift in parts)
    return sums.total.new_tensor(shift + math.log(total / count)), (total, shift)


def _share_of(sums: PairSums, whole: tuple[float, float]) -> float:
    """What divides sums by the whole: not by its logarithm, whose digits are spent on a large shift."""
    total, shift = whole
    return math.exp(sums.shift - shift) / total
