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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csdiff.losses.arguments import check_block_size, check_finite, check_matrix, check_same_width
from csdiff.losses.autograd import with_gradient, without_autocast
from csdiff.losses.bandwidth import Bandwidth, check_bandwidth, resolve_bandwidth
from csdiff.losses.process_group import gather_numbers, gather_rows


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


Combine = Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor | float]]]


def combine_log_means(x: Tensor, y: Tensor | None, terms: str, combine: Combine, options: KernelOptions) -> Tensor:
    """A function of some of `log V(x, x)`, `log V(y, y)`, `log V(x, y)`, differentiable by x and y.

    Args:
        x: `(N, D)` rows.
        y: `(M, D)` rows, or None.
        terms: those wanted, of "xx", "yy" and "xy", separated by spaces.
        combine: from their values, 0-d tensors in float64 (float32 where the device has no other), to the value of the
            function and its derivatives by each of them.
        options: of the kernel.
    """
    named = [("x", x), ("y", y)][: 1 if y is None else 2]
    for name, rows in named:
        check_matrix(name, rows)
    if y is not None:
        check_same_width(x, y)
    dtype = compute_dtype(*(rows.dtype for _, rows in named))
    with without_autocast(x.device):
        sets = [_Set(name, rows, dtype, options) for name, rows in named]
        widths = _place(sets, dtype, options)
    for one in sets:
        if f"{one.name}{one.name}" in terms and not options.diagonal and one.share.total == 1:
            raise ValueError(f"a mean without the diagonal needs at least two rows in {one.name}; found N = 1")

    def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        found = [_log_mean(term, sets, needed, widths, options) for term in terms.split()]
        value, derivatives = combine([log_mean for log_mean, _ in found])
        gradients: list[Tensor | None] = [None, None][: len(sets)]
        for (_, parts), derivative in zip(found, derivatives, strict=True):
            for side, part in parts.items():
                part.mul_(derivative)
                gradients[side] = part if gradients[side] is None else gradients[side].add_(part)
        return value.to(dtype), gradients

    return with_gradient(evaluate, *(one.rows for one in sets))


class _Set:
    """All rows of one argument, and the points that are made of them; `rows` are the local ones, with their graph."""

    def __init__(self, name: str, local: Tensor, dtype: torch.dtype, options: KernelOptions):
        self.name = name
        self.raw, self.share = gather_rows(name, local, options.group)
        if self.share.total == 0:
            raise ValueError(f"{name} must have at least one row; found shape {tuple(local.shape)} (N = 0)")
        prepare = unit_rows if options.normalize else torch.Tensor.to
        self.rows = prepare(local, dtype)
        self.all = self.rows.detach() if options.group is None else prepare(self.raw, dtype)


def _place(sets: list[_Set], dtype: torch.dtype, options: KernelOptions) -> tuple[float, ...]:
    """Make the centred points of the sets and return the widths of the kernel, the widest first."""
    centre = sum(one.all.mean(dim=0) for one in sets) / len(sets)
    for one in sets:
        # Unit rows and converted ones are a copy already; nothing else reads them.
        ours = one.all.data_ptr() != one.raw.data_ptr()
        one.all = one.all.sub_(centre) if ours else one.all - centre
        one.square = torch.linalg.vector_norm(one.all, dim=1).square_()
    if not bool(sum(one.square.sum() for one in sets).isfinite()):
        for one in sets:
            check_finite(one.name, one.raw)
        raise ValueError(f"the rows must have squared lengths within the range of {dtype}; found longer ones")
    widths = resolve_bandwidth(options.bandwidth, *(one.all for one in sets))
    factor = factor_dtype(sets[0].all.device, *(one.raw.dtype for one in sets))
    for one in sets:
        if factor is not None:
            one.all = one.all.to(factor)
            one.square = torch.linalg.vector_norm(one.all, dim=1, dtype=dtype).square_()
        one.points = Points(one.all, one.square)
    return tuple(reversed(widths))


def _log_mean(
    term: str, sets: list[_Set], needed: Sequence[bool], widths: tuple[float, ...], options: KernelOptions
) -> tuple[Tensor, dict[int, Tensor]]:
    """`log V` of a term over the rows of all processes, and its gradients by the local rows of the sets, by index."""
    i, j = ("xy".index(side) for side in term)
    left, right = sets[i], sets[j]
    world = left.share.world
    block = options.block_size or _block_size(left.points.rows.device)

    def sums(a: _Set, b: _Set, **wanted) -> tuple[KernelSums, Tensor, Tensor]:
        local = a.points[a.share.start : a.share.stop]
        found = kernel_sums(local, b.points, widths, block=block, **wanted)
        total, shift = _over_processes(found, options.group)
        # What divides the local sums by the whole: not from its logarithm, whose digits a large shift takes up.
        return found, torch.log(total) + shift, torch.exp(found.shift - shift) / total

    pull = 2 / (2 * widths[0] ** 2) * world
    if i == j:
        found, log_total, share = sums(left, left, own=left.share.start, diagonal=options.diagonal, row_pull=needed[i])
        count = left.share.total
        pairs = count * (count if options.diagonal else count - 1)
        # Each row stands on both sides of its pairs.
        gradients = {i: found.row_pull.mul_(2 * pull * share)} if needed[i] else {}
        return log_total - _log(pairs, log_total), gradients
    found, log_total, share = sums(left, right, row_pull=needed[i], col_pull=needed[j] and world == 1)
    gradients = {i: found.row_pull.mul_(pull * share)} if needed[i] else {}
    if needed[j]:
        other = found.col_pull
        if world > 1:
            # The local rows of y meet all of x here: computing this again is cheaper than sending partial gradients.
            again, _, share = sums(right, left, row_pull=True)
            other = again.row_pull
        gradients[j] = other.mul_(pull * share)
    return log_total - _log(left.share.total * right.share.total, log_total), gradients


def _over_processes(sums: "KernelSums", group: torch.distributed.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The total of all processes and its shift."""
    if group is None:
        return sums.total, sums.shift
    totals, shifts = gather_numbers(torch.stack([sums.total, sums.shift]), group).unbind(dim=1)
    shift = shifts.max()
    return (totals * torch.exp(shifts - shift)).sum(), shift


def _log(count: int, like: Tensor) -> Tensor:
    return torch.log(torch.tensor(float(count), dtype=like.dtype, device=like.device))


@dataclass
class Points:
    """Centred rows `(N, D)` as the products take them, with their squared norms `(N,)` in the dtype of the sums."""

    rows: Tensor
    square: Tensor

    def __getitem__(self, part: slice) -> "Points":
        return Points(self.rows[part], self.square[part])

    def __len__(self) -> int:
        return len(self.square)


@dataclass
class KernelSums:
    """What a pass leaves; all but the shift is to be multiplied by `exp(shift)`; pulls are `mix_i - weight_i a_i`."""

    total: Tensor
    shift: Tensor
    row_pull: Tensor | None = None
    col_pull: Tensor | None = None


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
) -> KernelSums:
    """One pass over all pairs of `a` and `b`.

    Args:
        a: one set.
        b: the other.
        widths: of the kernel, the widest first.
        block: rows and columns of a tile.
        own: where `a` is a part of `b`, the index in `b` of its first row. Where it is all of `b`, tiles are used for
            both of their places.
        diagonal: with `own`, whether the pairs of a point with itself are counted.
        row_pull: whether the pull on the rows of `a` is wanted.
        col_pull: whether that on the rows of `b` is.
    """
    base = 1 / (2 * widths[0] ** 2)
    ratios = [(widths[0] / width) ** 2 for width in widths]
    symmetric = own == 0 and len(a) == len(b)
    wide = wide_dtype(a.square.device)
    # A pair of a point with itself has kernel 1: no exponent is above it, and the shift stays 0.
    ones = len(a) if own is not None and diagonal else 0
    shift = a.square.new_zeros(()) if ones else a.square.new_full((), torch.finfo(a.square.dtype).min / 2)
    total = torch.full((), float(ones), dtype=wide, device=shift.device)
    rows = _Pull(a) if row_pull else None
    cols = rows if symmetric else _Pull(b) if col_pull else None
    buffer = a.square.new_empty(min(block, len(a)) * min(block, len(b)))

    for i in range(0, len(a), block):
        a_i = a[i : i + block]
        for j in range(i if symmetric else 0, len(b), block):
            b_j = b[j : j + block]
            tile = _exponents(a_i, b_j, base, buffer)
            if own is not None:
                fill_own(tile, own + i - j, -torch.inf)
            if not ones:
                before, shift = shift, torch.maximum(shift, tile.amax())
                total = total * torch.exp((before - shift).to(wide))
            value, weight = _kernels(tile, ratios, None if ones else shift)
            mirrored = symmetric and i != j
            total = total + value.sum(dim=1).sum(dtype=wide) * (2 if mirrored else 1)
            if rows is not None:
                rows.add(i, weight, b_j.rows, None if ones else shift)
            if cols is not None and (mirrored or not symmetric):
                cols.add(j, weight.T, a_i.rows, None if ones else shift)
    return KernelSums(
        total,
        shift.to(wide),
        None if rows is None else rows.finish(shift),
        None if cols is None or symmetric else cols.finish(shift),
    )


def _exponents(a: Points, b: Points, base: float, buffer: Tensor) -> Tensor:
    """`-s_0 ||a_i - b_j||^2` as a tile in `buffer`."""
    tile = buffer[: len(a) * len(b)].view(len(a), len(b))
    if a.rows.dtype == tile.dtype:
        torch.addmm(b.square, a.rows, b.rows.T, beta=-base, alpha=2 * base, out=tile)
    else:
        torch.add(-base * b.square, multiply(a.rows, b.rows.T), alpha=2 * base, out=tile)
    return tile.sub_((base * a.square)[:, None])


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

    def __init__(self, points: Points):
        self.points = points
        self.weight = torch.zeros_like(points.square)
        self.mix = torch.zeros(points.rows.shape, dtype=points.square.dtype, device=points.square.device)
        self.shifts: dict[int, Tensor] = {}

    def add(self, start: int, weight: Tensor, others: Tensor, shift: Tensor | None) -> None:
        part = slice(start, start + len(weight))
        if shift is not None:
            self._rescale(part, shift)
            self.shifts[start] = shift
        self.weight[part] += weight.sum(dim=1)
        mix = self.mix[part]
        if others.dtype == mix.dtype:
            mix.addmm_(weight, others)
        else:
            mix.add_(multiply(weight.to(others.dtype), others))

    def _rescale(self, part: slice, shift: Tensor) -> None:
        if part.start in self.shifts:
            factor = torch.exp(self.shifts[part.start] - shift)
            self.weight[part] *= factor
            self.mix[part] *= factor

    def finish(self, shift: Tensor) -> Tensor:
        """`mix_i - weight_i a_i` at one shift."""
        starts = sorted(self.shifts)
        for start, stop in zip(starts, [*starts, len(self.weight)][1:], strict=True):
            self._rescale(slice(start, stop), shift)
        return self.mix.addcmul_(self.points.rows.to(self.mix.dtype), self.weight[:, None], value=-1)


def fill_own(tile: Tensor, offset: int, value: float | Tensor) -> None:
    """Set the entries `(i, i + offset)` of a tile, those of a pair with itself."""
    if -tile.shape[0] < offset < tile.shape[1]:
        entries = tile.diagonal(offset)
        entries.copy_(value[: len(entries)]) if isinstance(value, Tensor) else entries.fill_(value)


def unit_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows over their lengths, in float32 or better; a zero row stays zero."""
    x = x.to(dtype or compute_dtype(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, torch.inf)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of many numbers: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def factor_dtype(device: torch.device, *dtypes: torch.dtype) -> torch.dtype | None:
    """bfloat16 where inputs of these dtypes are to be multiplied in it, on a GPU that does so faster; else None."""
    if device.type != "cuda" or any(dtype != torch.bfloat16 for dtype in dtypes):
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices, or of batches of them, with float32 sums and results where the factors are bfloat16."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.device.type == "cuda" and _FLOAT32_RESULTS:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# The argument out_dtype of matrix products came with torch 2.8.
_FLOAT32_RESULTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _block_size(device: torch.device) -> int:
    """Tiles that stay in the caches of a processor, or fill a GPU."""
    return 1024 if device.type == "cpu" else 4096
