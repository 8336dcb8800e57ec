"""Data sets of Hugging Face `datasets`: saved to disk, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csdiff.data.columns import Columns
from csdiff.data.items import Item, Problem
from csdiff.data.sources import IndexedSource
from csdiff.data.tables import IMAGE_COLUMNS, find_column


class HuggingFaceSource(IndexedSource):
    """A `datasets.Dataset` with captions, images, or both; images are kept encoded until they are needed.

    Args:
        dataset: The split.
        name: What it is called, for messages and for the fingerprint.
        image_column: By default the first column of images.
        caption_column: By default the first of the usual names.
        extra_columns: Further columns to keep, as text.
        folders: Images that a row names are relative to one of these, and lie below it.
        allow_outside: They may lie anywhere.

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
        folders: Sequence[Path] = (),
        allow_outside: bool = False,
    ):
        from datasets import Image

        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        image = find_column(dataset.column_names, image_column, (), name, "image_column")
        if image is None and images:
            image = find_column(images, None, IMAGE_COLUMNS, name, "image_column") or images[0]
        self.columns = Columns(
            dataset.column_names, image, caption_column, extra_columns, name, folders, allow_outside
        )
        dataset = dataset.select_columns(self.columns.names)
        if image in images:
            dataset = dataset.cast_column(image, Image(decode=False))
        self.dataset, self.name = dataset, name
        self.has_images, self.has_captions = image is not None, self.columns.caption is not None
        self.count = len(dataset)

    def __getitem__(self, index: int) -> Item | Problem:
        return self.columns.item(index, self.dataset[index])

    def identity(self) -> dict:
        return {
            "kind": "huggingface",
            "name": self.name,
            "items": self.count,
            "version": str(self.dataset.info.version),
            "columns": [self.columns.image, self.columns.caption],
        }
