"""The Cauchy-Schwarz divergence in linear time, from random Fourier features of the Gaussian kernel."""

import math

import torch
from torch import Tensor

from .arguments import check_block_size, check_finite, check_matrix, check_same_width
from .bandwidth import Bandwidth, check_bandwidth, resolve_bandwidth
from .dense import unit_rows
from .process_group import global_sum

BLOCK = 4096


def random_feature_cauchy_schwarz(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = 0.5,
    num_features: int = 2048,
    orthogonal: bool = True,
    diagonal: bool = True,
    normalize: bool = False,
    seed: int = 0,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Estimate of `cauchy_schwarz_divergence(x, y)` whose time and memory are linear in N and M.

    `D = log |m_x|^2 + log |m_y|^2 - 2 log (m_x . m_y)`, `m_x = mean_i f(x_i)`,
    `f(x) = sqrt(2 / F) [cos(w_1 . x), ..., cos(w_{F/2} . x), sin(w_1 . x), ...]`, `w_k ~ N(0, I / bandwidth^2)`

    `f(a) . f(b)` has the Gaussian kernel as its mean and a deviation of about `1 / sqrt(F)`. So the estimate needs
    kernels well above that: on unit rows, bandwidths above about 0.3. `m_x . m_y` below `1 / F` is noise and is taken
    as `1 / F`, without gradient. The error against N and F is measured in the page on the loss.

    Args:
        x: `(N, D)` rows, any floating dtype; computed in float32 or better.
        y: `(M, D)` rows.
        bandwidth: as for `cauchy_schwarz_divergence`; several widths share the features evenly.
        num_features: F, even.
        orthogonal: draw the directions of up to D frequencies orthogonal to each other, which lowers the error.
        diagonal: whether the within-set means include the pairs `i = j`.
        normalize: divide each row by its length first; a zero row stays zero.
        seed: of the frequencies; one seed gives the same frequencies on every device and process.
        block_size: rows whose features exist at once; 4096 by default.
        group: a process group whose processes hold shares of both sets, of any length: value and gradient as for
            `cauchy_schwarz_divergence`. Each process sends its two sums of features, `2 F` numbers, and no rows; a
            rule for the bandwidth is not available.

    Returns:
        A scalar, float64 if an input is, else float32.

    Raises:
        ValueError: as for `cauchy_schwarz_divergence`; F that is not even or is smaller than two for each width.

    Source:
        Rahimi, Recht, "Random features for large-scale kernel machines", 2007; Yu et al., "Orthogonal random
        features", 2016.
    """
    check_matrix("x", x)
    check_matrix("y", y)
    check_same_width(x, y)
    check_bandwidth(bandwidth)
    check_block_size(block_size)
    if group is not None and isinstance(bandwidth, str):
        raise ValueError(f"bandwidth must be a number with group=, since no rows are gathered; found {bandwidth!r}")
    with torch.autocast(device_type=x.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        if normalize:
            x, y = unit_rows(x), unit_rows(y)
        counts = global_sum(torch.tensor([len(x), len(y)], dtype=torch.float64, device=x.device), group).tolist()
        for name, rows, count in (("x", x, counts[0]), ("y", y, counts[1])):
            if count == 0:
                raise ValueError(f"{name} must have at least one row; found shape {tuple(rows.shape)} (N = 0)")
            if not diagonal and count == 1:
                raise ValueError(f"diagonal=False needs at least two rows in {name}; found N = 1")
            check_finite(name, rows.detach())
        widths = resolve_bandwidth(bandwidth, x, y)
        if num_features % 2 or num_features < 2 * len(widths):
            raise ValueError(
                f"num_features must be even and at least 2 for each of {len(widths)} widths; found {num_features}"
            )
        frequencies = draw_frequencies(x.shape[1], num_features // 2, widths, orthogonal=orthogonal, seed=seed)
        frequencies = frequencies.to(x.device, dtype)
        means = [
            global_sum(_FeatureSum.apply(rows, frequencies, block_size or BLOCK), group) / count
            for rows, count in zip((x, y), counts, strict=True)
        ]
        floor = 1 / num_features
        log_within = []
        for mean, count in zip(means, counts, strict=True):
            square = mean.square().sum()
            if not diagonal:
                # Each feature vector has length 1: the diagonal is known exactly.
                square = (square * count - 1).clamp_min(floor) / (count - 1)
            log_within.append(square.log())
        return log_within[0] + log_within[1] - 2 * (means[0] @ means[1]).clamp_min(floor).log()


def draw_frequencies(
    dim: int, count: int, widths: tuple[float, ...], *, orthogonal: bool = True, seed: int = 0
) -> Tensor:
    """Frequencies `(count, dim)` in float64, each `N(0, I / width^2)`, the widths taking turns.

    Orthogonal ones are the rows of random rotations, each given the length of an independent normal vector.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    if orthogonal:
        lengths = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        turns = []
        for part in normal.split(dim):
            square = torch.cat([part, torch.randn(dim - len(part), dim, generator=generator, dtype=torch.float64)])
            q, r = torch.linalg.qr(square.T)
            # The signs make the rotation uniformly distributed.
            turns.append((q * r.diagonal().sign()).T[: len(part)])
        normal = torch.cat(turns) * lengths
    scale = torch.tensor([widths[k % len(widths)] for k in range(count)], dtype=torch.float64)
    return normal / scale[:, None]


class _FeatureSum(torch.autograd.Function):
    """`sum_i f(x_i)`, `(F,)`, its features made block by block and made again for the gradient."""

    @staticmethod
    def forward(ctx, rows, frequencies, block):
        ctx.save_for_backward(rows, frequencies)
        ctx.block = block
        total = rows.new_zeros(2 * len(frequencies))
        for part in rows.split(block):
            angle = part @ frequencies.T
            total += torch.cat([angle.cos().sum(dim=0), angle.sin().sum(dim=0)])
        return total / math.sqrt(len(frequencies))

    @staticmethod
    def backward(ctx, grad):
        rows, frequencies = ctx.saved_tensors
        by_cos, by_sin = (grad / math.sqrt(len(frequencies))).chunk(2)
        found = []
        # Backward may be called inside autocast.
        with torch.autocast(device_type=rows.device.type, enabled=False):
            for part in rows.split(ctx.block):
                angle = part @ frequencies.T
                found.append((angle.cos() * by_sin - angle.sin() * by_cos) @ frequencies)
        return torch.cat(found), None, None
