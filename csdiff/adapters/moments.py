"""Streaming first and second moments of paired embeddings: all that the closed-form maps need."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from csdiff.errors import CSDiffError


class PairedMoments:
    r"""Count, means and covariances of text `x` (N, Dt) and image `y` (N, D) rows, added batch by batch in float64.

    Sums are kept about a fixed origin near the data, which avoids the cancellation of `E[x^2] - E[x]^2`. Memory is
    `Dt^2 + Dt*D + D^2` numbers whatever N is. Moments with the same origins add.
    """

    def __init__(self, origin_x: Tensor, origin_y: Tensor):
        self.origin_x, self.origin_y = origin_x.double(), origin_y.double()
        text_dim, image_dim = self.origin_x.numel(), self.origin_y.numel()
        self.count = 0
        self.sum_x, self.sum_y = torch.zeros(text_dim).double(), torch.zeros(image_dim).double()
        self.sum_xx = torch.zeros(text_dim, text_dim).double()
        self.sum_xy = torch.zeros(text_dim, image_dim).double()
        self.sum_yy = torch.zeros(image_dim, image_dim).double()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows `x` (B, Dt) and `y` (B, D)."""
        x, y = x.double() - self.origin_x, y.double() - self.origin_y
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.sum_xx += x.T @ x
        self.sum_xy += x.T @ y
        self.sum_yy += y.T @ y

    def __add__(self, other: "PairedMoments") -> "PairedMoments":
        total = PairedMoments(self.origin_x, self.origin_y)
        for name in ("count", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    mean_x = property(lambda self: self.origin_x + self.sum_x / self.count)
    mean_y = property(lambda self: self.origin_y + self.sum_y / self.count)
    cov_xx = property(lambda self: self._covariance(self.sum_xx, self.sum_x, self.sum_x))
    cov_xy = property(lambda self: self._covariance(self.sum_xy, self.sum_x, self.sum_y))
    cov_yy = property(lambda self: self._covariance(self.sum_yy, self.sum_y, self.sum_y))

    def _covariance(self, products: Tensor, sum_a: Tensor, sum_b: Tensor) -> Tensor:
        return products / self.count - torch.outer(sum_a, sum_b) / self.count**2

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """`mean ||y - weight x - bias||^2` over the rows, from the moments alone (`weight` is (D, Dt))."""
        offset = self.mean_y - weight @ self.mean_x - bias
        error = self.cov_yy.trace() - 2 * (weight * self.cov_xy.T).sum() + (weight @ self.cov_xx * weight).sum()
        return float(error + offset @ offset)


def paired_batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float batches (text, image) from a store with `read(indices)` and a length, or any iterable of pairs or dicts.

    Raises:
        CSDiffError: Rows that do not pair up, or that are not finite (with the place of the first).
    """
    if hasattr(data, "read"):
        store, starts = data, range(0, len(data), batch_size)
        data = (store.read(torch.arange(at, min(at + batch_size, len(store))).numpy()) for at in starts)
    seen = 0
    for batch in data:
        if isinstance(batch, dict):
            missing = [name for name in ("text_embeds", "image_embeds") if name not in batch]
            if missing:
                raise CSDiffError(f"A closed-form map needs pairs; {missing[0]!r} is missing, found {sorted(batch)}.")
            batch = batch["text_embeds"], batch["image_embeds"]
        text, image = (torch.as_tensor(part).detach().float().cpu() for part in batch)
        if text.ndim != 2 or image.ndim != 2 or len(text) != len(image):
            raise CSDiffError(
                f"Batches must be text (B, Dt) and image (B, D) rows; found {tuple(text.shape)} and "
                f"{tuple(image.shape)} after {seen} rows."
            )
        finite = text.isfinite().all(1) & image.isfinite().all(1)
        if not finite.all():
            raise CSDiffError(f"Row {seen + int((~finite).nonzero()[0])} holds a value that is NaN or infinite.")
        seen += len(text)
        yield text, image
