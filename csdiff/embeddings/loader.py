"""Endless shuffled batches from a store, the same whatever the number of processes and wherever they are resumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from csdiff.embeddings.order import ImageGroups, row_order
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
