"""Which rows come when: a new random order every epoch, and one caption of each image, by seed and epoch alone."""

from __future__ import annotations

import numpy as np


def row_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Random permutation (count,) int64 of `range(count)`: the order of hashed row numbers.

    It depends on `seed` and `epoch` only, and unlike a generator's it is the same for every version of numpy, so that
    a run can be resumed anywhere.
    """
    start = mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(epoch)
    keys = mix(mix(start) + np.arange(1, 3, dtype=np.uint64))
    return np.argsort(mix(mix(np.arange(count, dtype=np.uint64) + keys[0]) ^ keys[1]), kind="stable")


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters 64-bit integers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ImageGroups:
    """Rows grouped by image, to draw one row of each.

    Image g with n rows gives row `(offset(seed, g, e // n) + e) mod n` in epoch e: which of its captions comes is
    random, and n epochs show each of them exactly once. It follows from seed and epoch alone, so a run that is resumed
    anywhere draws what an undisturbed one does.

    Args:
        rows: Row numbers (N,) in the store.
        images: Number of the image (N,) of each of these rows, any integers.
    """

    def __init__(self, rows: np.ndarray, images: np.ndarray):
        _, first, group, self.counts = np.unique(images, return_index=True, return_inverse=True, return_counts=True)
        # Images are numbered in the order in which they first appear, whatever their numbers were.
        order = np.argsort(first, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.counts = self.counts[order]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.rows = np.asarray(rows, dtype=np.int64)[np.argsort(place[group], kind="stable")]

    def __len__(self) -> int:
        return len(self.counts)

    def pick(self, images: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Row numbers (int64), one of each of these images (int64, below `len`), for an epoch."""
        counts = self.counts[images].astype(np.uint64)
        key = mix(np.array([(seed ^ 0x5851F42D4C957F2D) & 0xFFFFFFFFFFFFFFFF], np.uint64))
        round_of = np.uint64(epoch) // counts
        offset = mix(mix(images.astype(np.uint64) + key) ^ round_of)
        return self.rows[self.starts[images] + ((offset + np.uint64(epoch)) % counts).astype(np.int64)]
