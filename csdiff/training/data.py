"""The rows a run trains on and is measured on."""

import warnings
import zlib
from collections.abc import Sequence
from functools import reduce

import numpy as np
from torch import Tensor

from csdiff.embeddings.image_groups import ImageGroups
from csdiff.embeddings.statistics import EmbeddingStatistics, Moments
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError

# Stores up to this many rows are split exactly; larger ones by a threshold on a hash, in one pass without a table.
_EXACT_SPLIT = 200_000
_HELD_OUT_LIMIT = 20_000
_STATISTICS_ROWS = 1 << 17


class Pairs:
    """Chosen rows of a store.

    Args:
        store: Where the rows are.
        rows: Row numbers in the store; all of them by default.

    Attributes:
        groups: The rows by image, where an epoch is to have one row of each; see `group_by_image`.
    """

    def __init__(self, store: EmbeddingStore, rows: np.ndarray | None = None):
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.groups: ImageGroups | None = None
        self._statistics: dict[str, EmbeddingStatistics] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch_rows(self) -> int:
        """Rows that an epoch has."""
        return len(self) if self.groups is None else len(self.groups)

    def group_by_image(self) -> None:
        """Let an epoch have one row of each image, where the store knows its images and some have several rows."""
        if self.store.knows_images:
            groups = ImageGroups(self.rows, self.store.image_numbers()[self.rows])
            self.groups = groups if len(groups) < len(self) else None

    def read(self, positions, keys: Sequence[str] = ("text_embeds", "image_embeds")) -> dict[str, Tensor]:
        """Rows by position among the chosen ones, as float32 tensors by column."""
        return self.store.read(self.rows[np.asarray(positions, dtype=np.int64)], keys)

    def all(self, keys: Sequence[str] = ("text_embeds", "image_embeds")) -> dict[str, Tensor]:
        """All rows at once."""
        return self.store.read(self.rows, keys)

    def sample(self, limit: int) -> "Pairs":
        """At most `limit` of the rows, evenly spread."""
        positions = np.unique(np.linspace(0, len(self) - 1, min(limit, len(self))).astype(np.int64))
        return Pairs(self.store, self.rows[positions])

    def statistics(self, key: str) -> EmbeddingStatistics:
        """Mean, deviation and norms of a column, from at most 131,072 rows.

        Raises:
            CSDiffError: one of these rows has NaN, infinity, or only zeros; named by file and row.
        """
        if key not in self._statistics:
            rows = self.sample(_STATISTICS_ROWS)
            parts = []
            for start in range(0, len(rows), 4096):
                part = rows.read(range(start, min(start + 4096, len(rows))), [key])[key]
                self._check(rows.rows[start:], key, part)
                parts.append(Moments.of(part))
            self._statistics[key] = reduce(Moments.merge, parts).statistics()
        return self._statistics[key]

    def _check(self, rows: np.ndarray, key: str, values: Tensor) -> None:
        norms = values.norm(dim=1)
        for what, wrong in (("NaN or infinity", ~norms.isfinite()), ("only zeros", norms == 0)):
            if wrong.any():
                first = self.store.place(key, int(rows[int(wrong.nonzero()[0])]))
                raise CSDiffError(
                    f"{self.store.path}: {first} has {what} ({int(wrong.sum())} of {len(values)} rows looked at): "
                    "embed these again, or leave them out."
                )

    def warn_of_constants(self) -> None:
        """Warn of a column whose rows are all the same, of which nothing can be learned."""
        for key in ("text_embeds", "image_embeds"):
            found = self.statistics(key)
            if found.std.max() <= 1e-6 * found.norm_mean:
                warnings.warn(
                    f"{self.store.path}: all {len(self)} {key.replace('_', ' ')} are the same, nothing can be learned "
                    "from them: look at how they were made.",
                    stacklevel=2,
                )


def held_out_split(store: EmbeddingStore, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out, by picture, the same for every run on the same data.

    Pictures are told apart by the store's `image_id`, else by their embedding (in stores too large for that, by row).
    About `fraction` of the rows is held out, at most 20,000.

    Raises:
        CSDiffError: if one of the two would be empty.
    """
    count = len(store)
    target = min(max(round(fraction * count), 2), _HELD_OUT_LIMIT)
    codes = np.concatenate([_codes(store, start, min(start + 8192, count)) for start in range(0, count, 8192)])
    if count > _EXACT_SPLIT:
        held_out = codes < target / count * 2**32
    else:
        values, counts = np.unique(codes, return_counts=True)
        enough = int(np.searchsorted(np.cumsum(counts), target)) + 1
        held_out = codes <= values[min(max(enough, 2), len(values)) - 1]
    train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or not len(validation):
        raise CSDiffError(
            f"{store.path}: holding out {fraction:.0%} of {count} rows leaves {len(train)} to train on and "
            f"{len(validation)} to validate on, expected both: give more data, --data.validation, or "
            "--data.validation_fraction 0."
        )
    return train, validation


def _codes(store: EmbeddingStore, start: int, stop: int) -> np.ndarray:
    """Well-spread 32-bit codes of the pictures of these rows."""
    rows = range(start, stop)
    if store.knows_images:
        keys = [str(value).encode() for value in store.image_ids(rows)]
    elif len(store) <= _EXACT_SPLIT:
        keys = [row.tobytes() for row in store.read(rows, keys=["image_embeds"])["image_embeds"].numpy()]
    else:
        keys = [b"%d" % row for row in rows]
    codes = np.fromiter((zlib.crc32(key) for key in keys), dtype=np.uint32, count=len(keys))
    # crc32 is linear: neighbouring numbers land in a pattern. The finaliser of murmur3 breaks it up.
    codes ^= codes >> np.uint32(16)
    codes *= np.uint32(0x85EBCA6B)
    codes ^= codes >> np.uint32(13)
    codes *= np.uint32(0xC2B2AE35)
    return codes ^ (codes >> np.uint32(16))
