"""Endless shuffled batches from a store, the same whatever the number of processes and wherever they are resumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError


class StoreBatches:
    """Iterate over a store in random order, forever.

    Every epoch is a new random permutation of the rows (of the images, with `groups`), which depends on seed and epoch
    only; the last incomplete batch of an epoch is dropped. Step t reads the same global batch whatever the number of
    processes; each process reads its part of it. Started at any step, the batches are those of an uninterrupted run,
    bit for bit.

    ```python
    batches = StoreBatches(store, batch_size=4096, seed=0, rank=rank, world_size=world_size, start_step=step)
    for batch in batches:  # never ends
        batch["text_embeds"], batch["image_embeds"], batch["index"]
    ```

    Args:
        store: Where the rows come from.
        batch_size: Rows of the global batch, over all processes.
        seed: Of the order.
        rank: Number of this process.
        world_size: Number of processes.
        start_step: First step to give.
        keys: Columns to read; all by default.
        captions: Also give `captions`, a list of strings.
        rows: Use these rows of the store only (a split); all by default.
        groups: Rows by image: an epoch then has one row of each image (see `ImageGroups`), so that no batch holds two
            captions of one image. Takes the place of `rows`.

    Attributes:
        epoch_size: Batches in an epoch.
        step: The next step that will be given.

    Raises:
        CSDiffError: The batch is larger than the data, or has fewer rows than there are processes.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        *,
        keys: Sequence[str] | None = None,
        captions: bool = False,
        rows: np.ndarray | range | None = None,
        groups: ImageGroups | None = None,
    ):
        count = len(groups) if groups is not None else len(store) if rows is None else len(rows)
        if not world_size <= batch_size <= count:
            unit = "rows" if groups is None else "images"
            raise CSDiffError(
                f"batch_size: expected {world_size} (a row for each process) to {count} (the {unit} in use of "
                f"{store.path}), found {batch_size}; change it or give more data."
            )
        self.store, self.batch_size, self.seed, self.step = store, batch_size, seed, start_step
        self.epoch_size = count // batch_size
        self.keys, self.with_captions = keys, captions
        self._rows = np.arange(count) if rows is None or groups is not None else np.asarray(rows, np.int64)
        self._groups = groups
        # The parts of an uneven batch differ by one row at most.
        self._part = slice(*(batch_size * (rank + i) // world_size for i in (0, 1)))
        self._order: tuple[int, np.ndarray] = (-1, self._rows)

    def indices(self, step: int) -> np.ndarray:
        """Row numbers (int64) that this process reads at a step."""
        epoch, batch = divmod(step, self.epoch_size)
        if self._order[0] != epoch:
            self._order = (epoch, row_order(len(self._rows), self.seed, epoch))
        places = self._order[1][batch * self.batch_size :][self._part]
        return self._rows[places] if self._groups is None else self._groups.pick(places, self.seed, epoch)

    def read(self, step: int) -> dict:
        """The batch of a step: the store's columns, and `index` (B,) int64, the rows they stand in."""
        rows = self.indices(step)
        batch = self.store.read(rows, self.keys)
        batch["index"] = torch.from_numpy(rows)
        if self.with_captions:
            batch["captions"] = self.store.captions(rows)
        return batch

    def __iter__(self) -> Iterator[dict]:
        # One thread reads two batches ahead, and torch's copies leave the interpreter to the training loop.
        with ThreadPoolExecutor(1, thread_name_prefix="store") as reader:
            ahead: deque = deque()
            try:
                while True:
                    while len(ahead) <= 2:
                        ahead.append(reader.submit(self.read, self.step + len(ahead)))
                    batch = ahead.popleft().result()
                    self.step += 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()


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
