"""Parquet files with the images inside, read without copying them into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from csdiff.data.columns import Columns
from csdiff.data.items import Item, Problem
from csdiff.data.sources import Source
from csdiff.data.tables import IMAGE_COLUMNS, check_rows, find_column
from csdiff.errors import CSDiffError

_ROWS_AT_ONCE = 64


class ParquetSource(Source):
    """Parquet files with a column of encoded images, as Hugging Face `datasets` writes them.

    The image column holds `{"bytes", "path"}` or the bytes themselves; only the row groups of a unit are read.

    Args:
        files: In order; all with the same columns.
        image_column: By default the first of the usual names.
        caption_column: By default the first of the usual names.
        extra_columns: Further columns to keep, as text.
        allow_outside: Read images that a row names outside the folder of its file.

    Raises:
        CSDiffError: A file is not parquet, or has too many rows for its size, or a column is not there.
    """

    has_images = True

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        extra_columns: Sequence[str] = (),
        allow_outside: bool = False,
    ):
        self.files = list(files)
        self.groups: list[tuple[Path, int, int, int]] = []
        """File, number, first row and last row + 1 of every row group."""
        self.count = 0
        for file in self.files:
            footer = parquet_footer(file)
            check_rows(file, footer.num_rows)
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                self.groups.append((file, group, self.count, self.count + rows))
                self.count += rows
        names = parquet_footer(self.files[0]).schema.to_arrow_schema().names
        image = find_column(names, image_column, IMAGE_COLUMNS, self.files[0], "image_column")
        folders = list(dict.fromkeys(file.parent for file in self.files))
        self.columns = Columns(names, image, caption_column, extra_columns, self.files[0], folders, allow_outside)
        self.has_captions = self.columns.caption is not None

    def units(self, size: int) -> int:
        return -(-self.count // size)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        start, stop = unit * size, min((unit + 1) * size, self.count)
        for file, group, row, end in self.groups:
            if row >= stop or end <= start:
                continue
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self.columns.names):
                    if row < stop and row + len(batch) > start:
                        for index, values in enumerate(batch.to_pylist(), row):
                            if start <= index < stop:
                                yield self.columns.item(index, values)
                    row += len(batch)

    def identity(self) -> dict:
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "items": self.count, "files": files}


def parquet_footer(file: Path):
    """Metadata of a parquet file.

    Raises:
        CSDiffError: It is not one.
    """
    try:
        return pq.read_metadata(file)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CSDiffError(f"{file} is not a readable parquet file ({error}); download or write it again.") from error
