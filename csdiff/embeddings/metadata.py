"""Captions and other per-row text of a store, from its parquet shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csdiff.errors import CSDiffError


class ShardedMetadata:
    """Columns of `metadata/metadata_{k}.parquet`, each loaded whole on first use.

    Args:
        files: In row order.

    Attributes:
        lengths: Rows of each file.
        names: Columns that every file has.

    Raises:
        CSDiffError: A file is not a parquet file.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        footers = [_footer(file) for file in files]
        self.lengths = [rows for rows, _ in footers]
        self.names = [name for name in footers[0][1] if all(name in names for _, names in footers)]
        self._columns: dict[str, pa.ChunkedArray] = {}

    def take(self, name: str, rows: np.ndarray) -> list:
        """Values of one column at these rows."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name].take(pa.array(rows)).to_pylist()

    def codes(self, name: str) -> np.ndarray:
        """A number (int64) for each row, equal where the values of a column are equal; keeps no column in memory."""
        column = self._columns.get(name)
        encoded = (self._read(name) if column is None else column).dictionary_encode("encode").combine_chunks()
        return encoded.indices.to_numpy().astype(np.int64)

    def _read(self, name: str) -> pa.ChunkedArray:
        parts = [pq.read_table(file, columns=[name], memory_map=True).column(0) for file in self.files]
        kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
        kind = kinds.pop() if len(kinds) == 1 else pa.large_string()
        # Parts by several tools differ (string, large_string, dictionary, numbers): as text they are one column. Its
        # offsets are 64 bits wide, as ten million captions have more than 2 GB.
        if pa.types.is_string(kind) or pa.types.is_dictionary(kind) or pa.types.is_null(kind):
            kind = pa.large_string()
        try:
            chunks = [chunk for part in parts for chunk in part.cast(kind).chunks]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            types = ", ".join(sorted({str(part.type) for part in parts}))
            raise CSDiffError(
                f"{self.files[0].parent}: the column {name!r} has parts of the types {types}, which cannot be read as "
                f"one column of text ({error}); write these files again."
            ) from error
        return pa.chunked_array(chunks, kind)


def _footer(file: Path) -> tuple[int, list[str]]:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.metadata.num_rows, opened.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise CSDiffError(f"{file} is not a readable parquet file ({error}); restore it or write it again.") from error
