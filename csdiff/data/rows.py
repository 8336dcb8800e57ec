"""Items from rows with images inside: parquet files, read without a copy, and data sets of Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from csdiff.data.items import Item, Problem, Source, SourceOptions, caption_list, printable
from csdiff.data.listing import image_file
from csdiff.data.tables import find_columns
from csdiff.errors import CSDiffError

_ROWS_AT_ONCE = 64


class RowSource(Source):
    """Rows of which a column is the image: `{"bytes", "path"}`, bytes, or a file below one of the folders."""

    def __init__(self, image: str | None, caption: str | None, options: SourceOptions, folders: Sequence[Path]):
        self.image, self.caption, self.options, self.folders = image, caption, options, folders
        self.columns = list(dict.fromkeys(filter(None, (image, self.caption, *options.metadata_columns))))
        self.has_images, self.has_captions = image is not None, self.caption is not None

    def item(self, index: int, values: dict) -> Item | Problem:
        """Item of a row."""
        id, extra = str(index), self.options.extra(values)
        captions = caption_list(values[self.caption]) if self.caption else []
        if self.image is None:
            return Item(id, captions or [""], extra=extra)
        image = values[self.image]
        if not isinstance(image, dict):
            image = {"path": image} if isinstance(image, str) else {"bytes": image}
        content, path = image.get("bytes"), image.get("path")
        label = None if path is None else printable(path)
        if isinstance(content, bytes):
            return Item(id, captions, content, label, extra)
        if path is None:
            return Problem(id, "missing_image", f"row {index} has no image")
        file = image_file(id, path, self.folders, self.options.allow_outside)
        return file if isinstance(file, Problem) else Item(id, captions, file, label, extra)


class ParquetSource(RowSource):
    """Parquet files with a column of encoded images, all with the same columns; a unit reads its row groups only."""

    def __init__(self, files: Sequence[Path], options: SourceOptions):
        self.files = list(files)
        self.groups: list[tuple[Path, int, int, int]] = []
        """File, number, first row and last row + 1 of every row group."""
        self.count = 0
        for file in self.files:
            footer = parquet_footer(file)
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                self.groups.append((file, group, self.count, self.count + rows))
                self.count += rows
        columns = find_columns(pq.read_schema(self.files[0]).names, options, self.files[0])
        super().__init__(*columns, options, list(dict.fromkeys(file.parent for file in self.files)))

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        span = self.span(unit, size)
        for file, group, row, end in self.groups:
            if row >= span.stop or end <= span.start:
                continue
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self.columns):
                    if row < span.stop and row + len(batch) > span.start:
                        for index, values in enumerate(batch.to_pylist(), row):
                            if index in span:
                                yield self.item(index, values)
                    row += len(batch)

    def identity(self) -> dict:
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "items": self.count, "files": files}


class HuggingFaceSource(RowSource):
    """A `datasets.Dataset` with captions, images, or both; images are kept encoded until they are needed."""

    def __init__(self, dataset, name: str, options: SourceOptions, folders: Sequence[Path]):
        from datasets import Image

        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        image, caption = find_columns(dataset.column_names, options, name)
        if options.image_column is None:
            image = find_columns(images, SourceOptions(), name)[0] or next(iter(images), None)
        super().__init__(image, caption, options, folders)
        dataset = dataset.select_columns(self.columns)
        self.dataset = dataset.cast_column(image, Image(decode=False)) if image in images else dataset
        self.name, self.count = name, len(dataset)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        for index in self.span(unit, size):
            yield self.item(index, self.dataset[index])

    def identity(self) -> dict:
        known = {"kind": "huggingface", "name": self.name, "items": self.count}
        return {**known, "version": str(self.dataset.info.version), "columns": [self.image, self.caption]}


def parquet_footer(file: Path):
    """Metadata of a parquet file, refused in one sentence if it is none."""
    try:
        return pq.read_metadata(file)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CSDiffError(f"{file} is not a readable parquet file ({error}); download or write it again.") from error
