"""One column of a store: npy shards on disk, mapped into memory and read as one long array."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csdiff.errors import CSDiffError

# Dimensions of a column's array, rows included.
DIMENSIONS = {"text_embeds": 2, "image_embeds": 2, "text_states": 3, "text_mask": 2, "image_tokens": 3}


class Shard:
    """One npy file; never unpickles. It is checked when the shard is made, and mapped on first use.

    npy has no bfloat16: such a shard holds its bits as uint16.
    """

    def __init__(self, path: Path, key: str, bfloat16: bool = False):
        self.path = path
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CSDiffError(f"{path} is not a whole npy file ({error}); restore it or write it again.") from error
        allowed = ("bool",) if key == "text_mask" else ("uint16",) if bfloat16 else ("float16", "float32", "float64")
        fits = array.dtype.name in allowed and array.dtype.isnative and array.ndim == DIMENSIONS[key]
        if not fits or not array.flags.c_contiguous or array.offset % array.itemsize:
            order = "C" if array.flags.c_contiguous else "Fortran"
            raise CSDiffError(
                f"{path}: expected {' / '.join(allowed)} in {DIMENSIONS[key]} dimensions, in C order, found "
                f"{array.dtype} {array.shape} in {order} order; save it again in that form."
            )
        # A longer file than the header says is as wrong as a truncated one, which numpy refuses.
        size, found = array.offset + array.nbytes, path.stat().st_size
        if found != size:
            raise CSDiffError(f"{path} is damaged: expected {size:,} bytes, found {found:,}; restore it.")
        self.shape, self.offset = array.shape, array.offset
        self.dtype = torch.bfloat16 if array.dtype == np.uint16 else torch.from_numpy(np.empty(0, array.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def tensor(self) -> Tensor:
        """The whole shard as a tensor over a memory map; nothing is read yet."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        # Unlike numpy's maps it keeps no file open: a store may have more shards than a process may have open files.
        start = self.offset // self.dtype.itemsize
        mapped = torch.from_file(str(self.path), size=start + int(np.prod(self.shape)), dtype=self.dtype)
        return mapped[start:].view(self.shape)


class Column:
    """Several shards as one array (N, ...) with random access, given as float32, or bool for masks."""

    def __init__(self, shards: list[Shard]):
        first = shards[0]
        for shard in shards[1:]:
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise CSDiffError(
                    f"{shard.path}: expected rows of {first.shape[1:]} {first.dtype} as in {first.path.name}, found "
                    f"{shard.shape[1:]} {shard.dtype}; shards of a folder must come from one encoder."
                )
        self.shards, self.dtype, self.row_shape = shards, first.dtype, tuple(first.shape[1:])
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])

    def gather(self, rows: np.ndarray) -> Tensor:
        """These rows (int64, in range), in that order; refused if one is not finite."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        gathered = torch.empty((len(rows), *self.row_shape), dtype=self.dtype)
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(places):
                shard = shards[places[0]]
                local = torch.from_numpy(rows[places] - self.starts[shard])
                found = self.shards[shard].tensor.index_select(0, local)
                gathered.index_copy_(0, torch.from_numpy(places), found)
        if gathered.dtype == torch.bool:
            return gathered
        values = gathered.float()
        # One sum instead of a look at every value: NaN and infinity reach it.
        if not torch.isfinite(values.sum()):
            wrong = (~values.flatten(1).isfinite().all(1)).nonzero()
            if len(wrong):
                folder, place = self.shards[0].path.parent.parent, self.place(int(rows[int(wrong[0])]))
                raise CSDiffError(
                    f"{folder}: {place} is not finite (NaN or infinity, as half precision gives on overflow; "
                    f"{len(wrong)} of {len(values)} rows read): embed these again, or leave them out."
                )
        return values

    def place(self, row: int) -> str:
        """Where a row is on the disk: "row 3 of img_emb/img_emb_0.npy"."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file = self.shards[number].path
        return f"row {row - int(self.starts[number])} of {file.parent.name}/{file.name}"
