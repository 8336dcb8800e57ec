"""Images in a folder, captioned by a table, by text files beside them, or not at all; and captions alone."""

from __future__ import annotations

import os
from pathlib import Path

from csdiff.data.images import IMAGE_SUFFIXES
from csdiff.data.items import Item, Problem
from csdiff.data.sources import IndexedSource
from csdiff.data.tables import CaptionTable
from csdiff.errors import CSDiffError

# A table of captions that lies in the folder of the images has one of these names.
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")


class ImageFolderSource(IndexedSource):
    """A folder of images.

    With a table, the table decides: its rows are the items, and a file that is not there is a problem. Without one,
    the items are all images below the folder in the order of their names, and `picture.txt` beside `picture.png`
    holds its captions, one a line.

    Args:
        folder: Of the images.
        table: Of their captions; file names are relative to the folder.

    Raises:
        CSDiffError: Not one image.
    """

    has_images = True

    def __init__(self, folder: Path, table: CaptionTable | None = None):
        self.folder, self.table = folder, table
        if table is None:
            names = sorted(
                (Path(parent) / name).relative_to(folder).as_posix()
                for parent, _, files in os.walk(folder, followlinks=True)
                for name in files
                if Path(name).suffix.lower() in IMAGE_SUFFIXES
            )
            if not names:
                raise CSDiffError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none.")
            captions = [_caption_file(folder / name) for name in names]
            self.has_captions = any(captions)
            self.table = CaptionTable(names, captions)
        else:
            self.has_captions = any(table.captions)
        self.count = len(self.table.captions)

    def __getitem__(self, index: int) -> Item | Problem:
        name = self.table.files[index]
        file = self.folder / name
        if not file.is_file():
            return Problem(name, "missing_image", f"no such file: {file}")
        extra = {column: values[index] for column, values in self.table.extra.items()}
        return Item(name, self.table.captions[index], file, name, extra)

    def identity(self) -> dict:
        return {"kind": "folder", "items": self.count, "sha256": self.table.sha256()}


class CaptionSource(IndexedSource):
    """Captions without images."""

    has_images = False
    has_captions = True

    def __init__(self, table: CaptionTable):
        self.table, self.count = table, len(table.captions)

    def __getitem__(self, index: int) -> Item:
        extra = {column: values[index] for column, values in self.table.extra.items()}
        return Item(str(index), self.table.captions[index], extra=extra)

    def identity(self) -> dict:
        return {"kind": "captions", "items": self.count, "sha256": self.table.sha256()}


def _caption_file(image: Path) -> list[str]:
    try:
        text = image.with_suffix(".txt").read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()] or [""]
