"""Mean, standard deviation and norms of a set of embeddings, in one pass and mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csdiff.errors import CSDiffError

# float16 rounds the norm of a unit vector by less than 1e-3; real CLIP norms vary by several per cent.
UNIT_NORM_TOLERANCE = 5e-3


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Statistics of `count` embeddings.

    Attributes:
        count: Number of rows behind the figures.
        mean: `(D,)` float32, per dimension.
        std: `(D,)` float32, per dimension, of the population (divided by `count`).
        norm_mean: Mean L2 norm of the rows.
        norm_std: Standard deviation of the norms (population).
    """

    count: int
    mean: Tensor
    std: Tensor
    norm_mean: float
    norm_std: float

    def to_dict(self) -> dict:
        """JSON-able form, as it stands in `csdiff.json`; the floats come back bit for bit."""
        numbers = {"count": self.count, "norm_mean": self.norm_mean, "norm_std": self.norm_std}
        return {**numbers, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, values: dict, where: str = "statistics") -> EmbeddingStatistics:
        """The statistics of a `csdiff.json`.

        Raises:
            CSDiffError: Not finite numbers, a negative deviation, or mean and deviation of different lengths.
        """
        try:
            mean, std = (torch.tensor(values[name], dtype=torch.float32) for name in ("mean", "std"))
            norms = [float(values[name]) for name in ("norm_mean", "norm_std")]
            finite = bool(torch.stack([mean, std]).isfinite().all()) and bool(np.isfinite(norms).all())
            if mean.ndim == 1 and finite and bool((std >= 0).all()):
                return cls(int(values["count"]), mean, std, *norms)
        except (KeyError, TypeError, ValueError, RuntimeError):
            pass
        raise CSDiffError(
            f"{where}: expected count, norm_mean, norm_std, and mean and std of one length, all finite and no "
            "deviation below 0; restore the file."
        )


@dataclass
class Moments:
    """Running count, mean and sum of squared deviations of rows and of their norms, in float64.

    Merged by the rule of Chan, Golub and LeVeque (1979): in shard order the bits are the same whoever counted which.
    """

    count: int
    mean: np.ndarray  # (D + 1,): the dimensions, then the norm
    squares: np.ndarray  # (D + 1,): sums of squared deviations from the mean

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Moments of rows `(N, D)`, N >= 0."""
        total = cls(0, np.zeros(rows.shape[1] + 1), np.zeros(rows.shape[1] + 1))
        for part in rows.split(16384):
            if len(part):
                # numpy sums in one thread: the same bits whatever the number of threads.
                part = part.double().numpy()
                part = np.concatenate([part, np.sqrt(np.square(part).sum(1, keepdims=True))], axis=1)
                mean = part.mean(0)
                total = total.merge(cls(len(part), mean, np.square(part - mean).sum(0)))
        return total

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + np.square(delta) * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def statistics(self) -> EmbeddingStatistics:
        std = np.sqrt(self.squares / max(self.count, 1))
        mean, deviation = (torch.from_numpy(values[:-1]).float() for values in (self.mean, std))
        return EmbeddingStatistics(self.count, mean, deviation, float(self.mean[-1]), float(std[-1]))

    def to_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_dict(cls, values: dict) -> Moments:
        return cls(values["count"], np.array(values["mean"]), np.array(values["squares"]))
