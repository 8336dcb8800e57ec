"""Parquet files with the images inside, read without copying them into a cache."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from csdiff.data.items import Item, Problem, caption_list
from csdiff.data.sources import Source
from csdiff.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column
from csdiff.errors import CSDiffError


class ParquetSource(Source):
    """Parquet files with a column of encoded images, as Hugging Face `datasets` writes them.

    The image column holds `{"bytes", "path"}` or the bytes themselves; only the row groups of a unit are read.

    Args:
        files: In order; all with the same columns.
        image_column: By default the first of the usual names.
        caption_column: By default the first of the usual names.
        extra_columns: Further columns to keep, as text.

    Raises:
        CSDiffError: A file is not parquet, or a column is not there.
    """

    has_images = True

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        extra_columns: Sequence[str] = (),
    ):
        self.files, self.extra_columns = list(files), list(extra_columns)
        self.starts = [0]
        for file in self.files:
            self.starts.append(self.starts[-1] + parquet_footer(file).num_rows)
        names = pq.read_schema(self.files[0]).names
        self.image_column = find_column(names, image_column, IMAGE_COLUMNS, self.files[0], "image_column")
        self.caption_column = find_column(names, caption_column, CAPTION_COLUMNS, self.files[0], "caption_column")
        for name in self.extra_columns:
            find_column(names, name, (), self.files[0], "metadata_columns")
        self.has_captions = self.caption_column is not None
        self.count = self.starts[-1]

    def units(self, size: int) -> int:
        return -(-self.count // size)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        start, stop = unit * size, min((unit + 1) * size, self.count)
        number = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            until = min(stop, self.starts[number + 1])
            yield from self._rows(number, start - self.starts[number], until - self.starts[number])
            start, number = until, number + 1

    def identity(self) -> dict:
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "items": self.count, "files": files}

    def _rows(self, number: int, start: int, stop: int) -> Iterator[Item | Problem]:
        columns = [name for name in (self.image_column, self.caption_column, *self.extra_columns) if name]
        with pq.ParquetFile(self.files[number]) as file:
            first, groups = 0, []
            skipped = 0
            for group in range(file.metadata.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                if first < stop and first + length > start:
                    groups.append(group)
                elif first + length <= start:
                    skipped = first + length
                first += length
            row = skipped
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=list(dict.fromkeys(columns))):
                if row + len(batch) > start:
                    for offset, values in enumerate(batch.to_pylist()):
                        if start <= row + offset < stop:
                            yield self._item(self.starts[number] + row + offset, values)
                row += len(batch)
                if row >= stop:
                    return

    def _item(self, index: int, values: dict) -> Item | Problem:
        image = values[self.image_column]
        path = None
        if isinstance(image, dict):
            image, path = image.get("bytes"), image.get("path")
        if not isinstance(image, bytes):
            return Problem(str(index), "missing_image", f"row {index} has no image bytes ({path})")
        captions = caption_list(values[self.caption_column]) if self.caption_column else []
        extra = {name: None if values[name] is None else str(values[name]) for name in self.extra_columns}
        return Item(str(index), captions, image, path, extra)


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
