"""One column of a store: npy shards on disk read as one long array."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from csdiff.errors import CSDiffError

# Linux 5.14 and later; maps all pages of a range at once instead of one fault each. Python names it from 3.15 on.
_MADV_POPULATE_READ = 22
# A mapped array is populated once this part of its rows has been asked for: it is being trained on.
POPULATE_AFTER = 1 / 64


class NpyShard:
    """One npy file; never unpickles.

    The header is read and checked against the size of the file when the shard is made; its rows are opened on first
    use.

    Args:
        path: The npy file.
        bfloat16: npy has no bfloat16: such a shard holds its bits as uint16.

    Raises:
        CSDiffError: Not an npy file, an object array, Fortran order, an unusable dtype, or a wrong file size.
    """

    def __init__(self, path: Path, bfloat16: bool = False):
        self.path, self.bfloat16 = path, bfloat16
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                self.shape, fortran, self.dtype = read_header[version[0]](file)
                self.offset = file.tell()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise CSDiffError(f"{path} is not a readable npy file ({error}); write this shard again.") from error
        allowed = ("uint16",) if bfloat16 else ("float16", "float32", "float64", "bool")
        if self.dtype.name not in allowed or not self.dtype.isnative or len(self.shape) < 2 or fortran:
            raise CSDiffError(
                f"{path}: expected a C-ordered array of at least two dimensions of {' / '.join(allowed)}, found "
                f"{self.dtype} {self.shape}{' in Fortran order' if fortran else ''}; save it again in that form."
            )
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        expected, found = self.offset + len(self) * self.row_bytes, path.stat().st_size
        # A longer file than the header says is as wrong as a truncated one.
        if expected != found:
            raise CSDiffError(f"{path} is damaged: its header says {expected:,} bytes, found {found:,}; restore it.")
        self._tensor: torch.Tensor | None = None
        self._map = None
        self._file = None

    def __len__(self) -> int:
        return self.shape[0]

    def tensor(self) -> torch.Tensor:
        """The whole shard as a read-only tensor over a memory map (nothing is read yet)."""
        if self._tensor is None:
            if len(self) == 0:  # An empty range cannot be mapped.
                array = np.empty(self.shape, self.dtype)
            else:
                array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
                self._map = array._mmap
            with warnings.catch_warnings():
                # torch warns of the missing write permission; the tensor is only gathered from.
                warnings.simplefilter("ignore", UserWarning)
                self._tensor = torch.from_numpy(array)
            if self.bfloat16:
                self._tensor = self._tensor.view(torch.bfloat16)
        return self._tensor

    def populate(self) -> None:
        """Read the whole shard and map its pages at once: twenty times cheaper than one page fault a row."""
        self.tensor()
        # An older system faults the pages in one by one.
        with contextlib.suppress(AttributeError, OSError):
            self._map.madvise(_MADV_POPULATE_READ)

    def descriptor(self) -> int:
        """An open file descriptor for positioned reads."""
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):
                # Rows are far apart: what the system would read ahead is not wanted.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return self._file.fileno()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` read sequentially from the file, past the memory map."""
        shape = (max(stop - start, 0), *self.shape[1:])
        count = int(np.prod(shape, dtype=np.int64))
        array = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * self.row_bytes).reshape(shape)
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.bfloat16 else tensor


class ShardedArray:
    """Several shards as one array (N, ...) with random access.

    Args:
        shards: In row order, all of one shape but for the rows.
        mapped: Gather rows through memory maps, the fastest once mapped. Otherwise by positioned reads, at about half
            the
            speed: mapped pages count as memory of the process, and mapping one page for each row of an array much
            larger than memory costs more than reading it.
    """

    def __init__(self, shards: list[NpyShard], mapped: bool = True):
        first = shards[0]
        for shard in shards[1:]:
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise CSDiffError(
                    f"{shard.path}: expected rows of {first.dtype} {first.shape[1:]} as in {first.path.name}, found "
                    f"{shard.dtype} {shard.shape[1:]}; all shards of a folder must come from one encoder."
                )
        self.shards, self.mapped = shards, mapped or not hasattr(os, "preadv")
        self.row_shape = tuple(first.shape[1:])
        self.row_bytes = first.row_bytes
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])
        self._buffers = threading.local()
        self._gathered, self._populated = 0, False
        self.storage_dtype = torch.bfloat16 if first.bfloat16 else torch.from_numpy(np.empty(0, first.dtype)).dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, indices: np.ndarray) -> torch.Tensor:
        """Rows `indices` (int64, in range), in that order: float32, or bool for masks."""
        if not self.mapped:
            return self._converted(self._gather_read(indices))
        if not self._populated:
            self._gathered += len(indices)
            if self._gathered > POPULATE_AFTER * len(self):
                self.populate()
        if len(self.shards) == 1:
            return self._converted(self.shards[0].tensor().index_select(0, torch.from_numpy(indices)))
        return self._converted(self._gather_mapped(indices))

    def _gather_mapped(self, indices: np.ndarray) -> torch.Tensor:
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        local = torch.from_numpy((indices - self.starts[shard_of])[order])
        used, first = np.unique(shard_of[order], return_index=True)
        edges = [*first.tolist(), len(indices)]
        gathered = torch.empty((len(indices), *self.row_shape), dtype=self.storage_dtype)
        for shard, start, stop in zip(used.tolist(), edges[:-1], edges[1:], strict=True):
            torch.index_select(self.shards[shard].tensor(), 0, local[start:stop], out=gathered[start:stop])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        # Back to the caller's order in the narrow type, before the conversion doubles the bytes.
        return gathered.index_select(0, torch.from_numpy(back))

    def _gather_read(self, indices: np.ndarray) -> torch.Tensor:
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        offsets = (indices - self.starts[shard_of]) * self.row_bytes
        if len(self.shards) == 1:
            files, headers = repeat(self.shards[0].descriptor()), self.shards[0].offset
        else:
            files = [self.shards[shard].descriptor() for shard in shard_of.tolist()]
            headers = np.array([shard.offset for shard in self.shards])[shard_of]
        rows = self._buffer(len(indices))
        # The loop over rows runs inside `sum` and `map`: as Python statements it would cost as much as the reads.
        read = sum(map(os.preadv, files, zip(rows), (offsets + headers).tolist()))
        if read != rows.nbytes:
            raise OSError(
                f"{self.shards[0].path.parent}: expected {rows.nbytes} bytes, read {read}; a shard was cut short."
            )
        return torch.from_numpy(rows.reshape(-1)).view(self.storage_dtype).reshape(len(indices), *self.row_shape)

    def _buffer(self, count: int) -> np.ndarray:
        if self.storage_dtype in (torch.float32, torch.bool):
            return np.empty((count, self.row_bytes), np.uint8)
        # What is converted is copied: one buffer a thread serves all batches.
        buffer = getattr(self._buffers, "rows", None)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers.rows = np.empty((count, self.row_bytes), np.uint8)
        return buffer[:count]

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop`, read sequentially: float32, or bool for masks."""
        parts = []
        for shard, first in zip(self.shards, self.starts[:-1].tolist(), strict=True):
            low, high = max(start - first, 0), min(stop - first, len(shard))
            if low < high:
                parts.append(shard.rows(low, high))
        return self._converted(
            torch.cat(parts) if parts else torch.empty((0, *self.row_shape), dtype=self.storage_dtype)
        )

    def populate(self) -> None:
        """Map all pages now, see `NpyShard.populate`."""
        self._populated = True
        for shard in self.shards:
            shard.populate()

    @staticmethod
    def _converted(rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.dtype == torch.bool else rows.float()
