"""Data sets of Hugging Face `datasets`: saved to disk, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csdiff.data.items import Item, Problem, caption_list
from csdiff.data.sources import IndexedSource
from csdiff.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column


class HuggingFaceSource(IndexedSource):
    """A `datasets.Dataset` with captions, images, or both; images are kept encoded until they are needed.

    Args:
        dataset: The split.
        name: What it is called, for messages and for the fingerprint.
        image_column: By default the first column of images.
        caption_column: By default the first of the usual names.
        extra_columns: Further columns to keep, as text.

    Raises:
        CSDiffError: A column is not there.
    """

    def __init__(
        self,
        dataset,
        name: str,
        image_column: str | None = None,
        caption_column: str | None = None,
        extra_columns: Sequence[str] = (),
    ):
        from datasets import Image

        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        self.image_column = find_column(dataset.column_names, image_column, (), name, "image_column")
        if self.image_column is None and images:
            self.image_column = find_column(images, None, IMAGE_COLUMNS, name, "image_column") or images[0]
        self.caption_column = find_column(
            dataset.column_names, caption_column, CAPTION_COLUMNS, name, "caption_column"
        )
        for column in extra_columns:
            find_column(dataset.column_names, column, (), name, "metadata_columns")
        wanted = dict.fromkeys(c for c in (self.image_column, self.caption_column, *extra_columns) if c)
        dataset = dataset.select_columns(list(wanted))
        if self.image_column in images:
            dataset = dataset.cast_column(self.image_column, Image(decode=False))
        self.dataset, self.name, self.extra_columns = dataset, name, list(extra_columns)
        self.has_images, self.has_captions = self.image_column is not None, self.caption_column is not None
        self.count = len(dataset)

    def __getitem__(self, index: int) -> Item | Problem:
        values = self.dataset[index]
        captions = caption_list(values[self.caption_column]) if self.caption_column else []
        extra = {name: None if values[name] is None else str(values[name]) for name in self.extra_columns}
        if not self.has_images:
            return Item(str(index), captions or [""], extra=extra)
        image = values[self.image_column]
        image = {"path": image} if isinstance(image, str) else image or {}
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is not None:
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                return Problem(str(index), "missing_image", str(error))
        if content is None:
            return Problem(str(index), "missing_image", f"row {index} has no image")
        return Item(str(index), captions, content, path, extra)

    def identity(self) -> dict:
        return {
            "kind": "huggingface",
            "name": self.name,
            "items": self.count,
            "version": str(self.dataset.info.version),
            "columns": [self.image_column, self.caption_column],
        }
