"""The Cauchy-Schwarz divergence between two sets of points."""

import math

import torch
from torch import Tensor

from .arguments import check_block_size, check_rows, check_same_width
from .bandwidth import Bandwidth, resolve_bandwidth


def _log_mean(x, y, widths, exclude):
    d2 = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") if False else (
        x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    ).clamp_min(0)
    e = torch.stack([-d2 / (2 * w * w) for w in widths]).logsumexp(0) - math.log(len(widths))
    count = d2.numel()
    if exclude:
        eye = torch.eye(len(x), dtype=torch.bool, device=x.device)
        e, count = e.masked_fill(eye, -math.inf), count - len(x)
    return e.flatten().logsumexp(0) - math.log(count)


def cauchy_schwarz_divergence(x: Tensor, y: Tensor, *, bandwidth: Bandwidth = 0.5, diagonal=True, normalize=False,
                              block_size=None, group=None, within_y=None) -> Tensor:
    check_rows("x", x)
    check_rows("y", y)
    check_same_width(x, y)
    check_block_size(block_size)
    if normalize:
        x, y = torch.nn.functional.normalize(x.float(), dim=1), torch.nn.functional.normalize(y.float(), dim=1)
    w = resolve_bandwidth(bandwidth, x, y)
    yy = _log_mean(y, y, w, not diagonal) if within_y is None else within_y
    return _log_mean(x, x, w, not diagonal) + yy - 2 * _log_mean(x, y, w, False)


def log_mean_kernel(x, y=None, *, bandwidth: Bandwidth = 0.5, diagonal=True, normalize=False, block_size=None, group=None):
    check_rows("x", x)
    if normalize:
        x = torch.nn.functional.normalize(x.float(), dim=1)
        y = None if y is None else torch.nn.functional.normalize(y.float(), dim=1)
    w = resolve_bandwidth(bandwidth, x, y)
    return _log_mean(x, x, w, not diagonal) if y is None else _log_mean(x, y, w, False)
