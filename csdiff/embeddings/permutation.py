"""A seeded random order of the rows of a store, the same on every machine, process and version of numpy."""

from __future__ import annotations

import numpy as np

# Up to here an order is drawn as a whole (8 MB); above it is computed where it is asked for, in no memory.
DRAWN_ROWS = 1 << 20
_ROUNDS = 8


class RowOrder:
    """Random permutation of `range(count)` that depends on `seed` and `epoch` only.

    Up to a million rows: the order of hashed row numbers, a draw from all permutations. Above, a Feistel network on
    the smallest number of bits that holds the row numbers, followed until it lands inside them (cycle walking; Black
    and Rogaway 2002): a pseudo-random permutation that gives any part of the order without storing the rest.

    Args:
        count: Number of rows, at least 1.
        seed: Of the run.
        epoch: Each epoch has its own order.
    """

    def __init__(self, count: int, seed: int, epoch: int):
        self.count = count
        start = mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(epoch)
        self._keys = mix(mix(start) + np.arange(1, _ROUNDS + 1, dtype=np.uint64))
        self._order = None
        if count <= DRAWN_ROWS:
            hashed = mix(mix(np.arange(count, dtype=np.uint64) + self._keys[0]) ^ self._keys[1])
            self._order = np.argsort(hashed, kind="stable")
        bits = max(2, (count - 1).bit_length())
        self._widths = np.uint64(bits // 2), np.uint64(bits - bits // 2)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Row numbers (int64) at these places of the order."""
        if self._order is not None:
            return self._order[part]
        rows = np.arange(*part.indices(self.count), dtype=np.uint64)
        outside = np.ones(len(rows), bool)
        while outside.any():
            rows[outside] = self._encrypt(rows[outside])
            outside = rows >= self.count
        return rows.astype(np.int64)

    def _encrypt(self, rows: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._widths
        left, right = rows >> right_bits, rows & _low(right_bits)
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & _low(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


def _low(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters 64-bit integers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
