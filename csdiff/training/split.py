"""Which rows of a store are held out when there is no validation data."""

import zlib

import numpy as np

from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError

# Stores up to this many rows are split exactly; larger ones by a threshold on a hash, in one pass without a table.
_EXACT_SPLIT = 200_000
_HELD_OUT_LIMIT = 20_000


def held_out_split(store: EmbeddingStore, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out, by image, the same for every run on the same data.

    Images are told apart by the store's `image_id`, else by their embedding (in stores too large for that, by row).
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
    """Well-spread 32-bit codes of the images of these rows."""
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
