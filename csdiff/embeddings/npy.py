"""Writing an npy file whose number of rows is known only at its end."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csdiff.embeddings.statistics import Moments
from csdiff.errors import CSDiffError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "bool": torch.bool}


class NpyWriter:
    """Append rows to an npy file.

    bfloat16, which npy does not have, is written as the uint16 of its bits.

    Args:
        path: Of the file; it is on the disk when `close` returns.
        dtype: "float16", "bfloat16", "float32" or "bool".
        measure: Collect the moments of the rows, as they stand in the file.

    Raises:
        CSDiffError: A value is not finite, or beyond the range of the dtype.
    """

    def __init__(self, path: Path, dtype: str, measure: bool = False):
        self.path, self.dtype, self.rows = path, DTYPES[dtype], 0
        self._measure = measure
        self.moments: Moments | None = None
        self._shape: tuple[int, ...] | None = None
        self._file = path.open("wb")

    def append(self, rows: Tensor) -> None:
        """Add rows (B, ...)."""
        rows = rows.detach().to("cpu")
        stored = rows.to(self.dtype).contiguous()
        if self._shape is None:
            self._shape = tuple(stored.shape[1:])
            self._write_header()
        if not bool(torch.isfinite(stored).all()):
            raise CSDiffError(
                f"{self.path.stem}: expected finite values, found {float(rows.float().abs().max()):g} to be stored as "
                f"{str(self.dtype).removeprefix('torch.')}; use dtype bfloat16 or float32, or precision float32."
            )
        if self._measure:
            part = Moments.of(stored.float())
            self.moments = part if self.moments is None else self.moments.merge(part)
        if stored.dtype == torch.bfloat16:
            stored = stored.view(torch.uint16)
        self._file.write(stored.numpy().data)
        self.rows += len(stored)

    def close(self, shape: tuple[int, ...] | None = None) -> None:
        """Complete the header and flush to the disk; `shape` is that of a row, for a file without rows."""
        if self._shape is None:
            self._shape = shape
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that it has one length for any number of rows.
        name = {torch.bfloat16: "<u2", torch.float16: "<f2", torch.float32: "<f4", torch.bool: "|b1"}[self.dtype]
        self._file.seek(0)
        header = {"descr": name, "fortran_order": False, "shape": (self.rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
