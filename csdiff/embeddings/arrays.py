"""One column of a store: npy shards read through memory maps as one long array."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import numpy as np
import torch

from csdiff.errors import CSDiffError


class NpyShard:
    """One memory-mapped npy file; never unpickles.

    The header is read and checked against the size of the file when the shard is made, the file is mapped on first use.

    Args:
        path: The npy file.
        bfloat16: npy has no bfloat16: such a shard holds its bits as uint16.

    Raises:
        CSDiffError: Not an npy file, an object array, Fortran order, an unusable dtype, or a wrong file size.
    """

    def __init__(self, path: Path, bfloat16: bool = False):
        self.path, self.bfloat16 = path, bfloat16
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                self.shape, fortran, self.dtype = read_header[version[0]](file)
                self.offset = file.tell()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise CSDiffError(f"{path} is not a readable npy file ({error}); write this shard again.") from error
        allowed = ("uint16",) if bfloat16 else ("float16", "float32", "float64", "bool")
        if self.dtype.name not in allowed or len(self.shape) < 2 or fortran:
            raise CSDiffError(
                f"{path}: expected a C-ordered array of at least two dimensions of {' / '.join(allowed)}, found "
                f"{self.dtype} {self.shape}{' in Fortran order' if fortran else ''}; save it again in that form."
            )
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        expected, found = self.offset + len(self) * self.row_bytes, path.stat().st_size
        # A longer file than the header says is as wrong as a truncated one.
        self.size_error = None if expected == found else f"expected {expected:,} bytes, found {found:,}"
        self._tensor: torch.Tensor | None = None
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def tensor(self, random_access: bool = False) -> torch.Tensor:
        """The whole shard as a read-only tensor over the memory map (nothing is read yet)."""
        if self._tensor is None:
            if len(self) == 0:  # An empty range cannot be mapped.
                array = np.empty(self.shape, self.dtype)
            else:
                array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
                self._map = array._mmap
                if random_access and hasattr(mmap, "MADV_RANDOM"):
                    self._map.madvise(mmap.MADV_RANDOM)
            with warnings.catch_warnings():
                # torch warns of the missing write permission; the tensor is only gathered from.
                warnings.simplefilter("ignore", UserWarning)
                self._tensor = torch.from_numpy(array)
            if self.bfloat16:
                self._tensor = self._tensor.view(torch.bfloat16)
        return self._tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` read sequentially from the file, past the memory map."""
        shape = (max(stop - start, 0), *self.shape[1:])
        count = int(np.prod(shape, dtype=np.int64))
        array = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * self.row_bytes).reshape(shape)
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.bfloat16 else tensor

    def release(self) -> None:
        """Give the pages mapped so far back; they stay in the system's page cache and are mapped again when needed."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ShardedArray:
    """Several shards as one array (N, ...) with random access.

    Args:
        shards: In row order, all of one shape but for the rows.
        random_access: Tell the system not to read ahead around a row (for arrays much larger than memory).
    """

    def __init__(self, shards: list[NpyShard], random_access: bool = False):
        first = shards[0]
        for shard in shards[1:]:
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise CSDiffError(
                    f"{shard.path}: expected rows of {first.dtype} {first.shape[1:]} as in {first.path.name}, found "
                    f"{shard.dtype} {shard.shape[1:]}; all shards of a folder must come from one encoder."
                )
        self.shards, self.random_access = shards, random_access
        self.row_shape = tuple(first.shape[1:])
        self.row_bytes = first.row_bytes
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])
        self.storage_dtype = torch.bfloat16 if first.bfloat16 else torch.from_numpy(np.empty(0, first.dtype)).dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, indices: np.ndarray) -> torch.Tensor:
        """Rows `indices` (int64, in range), in that order: float32, or bool for masks."""
        if len(self.shards) == 1:
            rows = self.shards[0].tensor(self.random_access).index_select(0, torch.from_numpy(indices))
            return self._converted(rows)
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        local = torch.from_numpy((indices - self.starts[shard_of])[order])
        used, first = np.unique(shard_of[order], return_index=True)
        edges = [*first.tolist(), len(indices)]
        gathered = torch.empty((len(indices), *self.row_shape), dtype=self.storage_dtype)
        for shard, start, stop in zip(used.tolist(), edges[:-1], edges[1:]):
            source = self.shards[shard].tensor(self.random_access)
            torch.index_select(source, 0, local[start:stop], out=gathered[start:stop])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        # Back to the caller's order in the narrow type, before the conversion doubles the bytes.
        return self._converted(gathered.index_select(0, torch.from_numpy(back)))

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop`, read sequentially: float32, or bool for masks."""
        parts = []
        for shard, first in zip(self.shards, self.starts.tolist()):
            low, high = max(start - first, 0), min(stop - first, len(shard))
            if low < high:
                parts.append(shard.rows(low, high))
        return self._converted(
            torch.cat(parts) if parts else torch.empty((0, *self.row_shape), dtype=self.storage_dtype)
        )

    def release(self) -> None:
        for shard in self.shards:
            shard.release()

    @staticmethod
    def _converted(rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.dtype == torch.bool else rows.float()
