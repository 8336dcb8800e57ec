"""Items from the columns of parquet files and of `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csdiff.data.items import Item, Problem, caption_list, extra_columns, printable
from csdiff.data.tables import CAPTION_COLUMNS, find_column
from csdiff.data.walk import inside


class Columns:
    """Which columns of a row are its image, its captions and what to keep besides.

    Args:
        names: Of all columns.
        image: Column of the images; None for captions alone.
        caption: Column of the captions; by default the first of the usual names.
        extra: Further columns to keep, as text.
        where: Of the data, for messages.
        folders: Images that a row names are relative to one of these, and lie below it.
        allow_outside: They may lie anywhere.

    Raises:
        CSDiffError: A column is not there.
    """

    def __init__(
        self,
        names: Sequence[str],
        image: str | None,
        caption: str | None,
        extra: Sequence[str],
        where: object,
        folders: Sequence[Path],
        allow_outside: bool,
    ):
        self.image, self.extra, self.folders, self.allow_outside = image, list(extra), folders, allow_outside
        self.caption = find_column(names, caption, CAPTION_COLUMNS, where, "caption_column")
        for name in extra:
            find_column(names, name, (), where, "metadata_columns")
        self.names = list(dict.fromkeys(name for name in (image, self.caption, *extra) if name))

    def item(self, index: int, values: dict) -> Item | Problem:
        """Item of a row."""
        captions = caption_list(values[self.caption]) if self.caption else []
        extra = extra_columns(values, self.extra)
        if self.image is None:
            return Item(str(index), captions or [""], extra=extra)
        image = values[self.image]
        if not isinstance(image, dict):
            image = {"path": image} if isinstance(image, str) else {"bytes": image}
        content, path = image.get("bytes"), image.get("path")
        label = None if path is None else printable(path)
        if isinstance(content, bytes):
            return Item(str(index), captions, content, label, extra)
        if path is None:
            return Problem(str(index), "missing_image", f"row {index} has no image")
        places = [inside(folder, path, self.allow_outside) for folder in self.folders]
        places = [place for place in places if place is not None]
        if not places:
            return Problem(str(index), "outside_image", f"{label} is outside; --allow_outside true reads it")
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return Problem(str(index), "missing_image", f"no such file: {label}")
        return Item(str(index), captions, file, label, extra)
