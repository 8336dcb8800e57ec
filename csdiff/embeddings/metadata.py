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
        lengths: Rows of each file.
        names: Columns that every file has.
    """

    def __init__(self, files: list[Path], lengths: list[int], names: list[str]):
        self.files, self.lengths, self.names = files, lengths, names
        self._columns: dict[str, pa.ChunkedArray] = {}

    @classmethod
    def open(cls, shards: dict[int, Path]) -> ShardedMetadata | None:
        """Read the footers; None when there are no shards.

        Raises:
            CSDiffError: A shard is not a parquet file.
        """
        lengths, names = [], None
        for file in shards.values():
            try:
                footer = pq.ParquetFile(file)
                columns = footer.schema_arrow.names
                lengths.append(footer.metadata.num_rows)
                footer.close()
            except (OSError, pa.ArrowException) as error:
                raise CSDiffError(
                    f"{file} is not a readable parquet file ({error}); restore it or write it again."
                ) from error
            names = columns if names is None else [name for name in names if name in columns]
        return cls(list(shards.values()), lengths, names) if shards else None

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
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)
