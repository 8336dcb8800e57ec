"""Webdataset shards: tar files of images and captions under common keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from csdiff.data.images import IMAGE_SUFFIXES
from csdiff.data.items import Item, Problem, caption_list
from csdiff.data.sources import Source
from csdiff.data.tables import CAPTION_COLUMNS


class WebDatasetSource(Source):
    """Tar files in which `key.jpg`, `key.txt` and `key.json` belong together; one unit a file.

    Captions are the lines of `key.txt`, or the caption field of `key.json`. A damaged archive gives the items before
    the damage, then a problem.

    Args:
        files: In order.
        image_column: Suffix of the images; by default any image suffix.
        caption_column: Suffix of the captions, or the field of `key.json` that holds them; by default `txt`, else the
            usual names of the field.
        extra_columns: Fields of `key.json` to keep, as text.
    """

    count = None

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        extra_columns: Sequence[str] = (),
    ):
        self.files = list(files)
        stems = [file.stem for file in self.files]
        self._names = stems if len(set(stems)) == len(stems) else [str(unit) for unit in range(len(stems))]
        self.image_column, self.caption_column, self.extra_columns = image_column, caption_column, list(extra_columns)
        # What the first entries have, the archive has: an entry without is then a problem of that entry.
        first = list(islice(self.read(0, 0), 100))
        items = [item for item in first if isinstance(item, Item)]
        self.has_captions = any(item.captions for item in items)
        self.has_images = any(item.image is not None for item in items) or not items

    def units(self, size: int) -> int:
        return len(self.files)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        from webdataset.tariterators import tarfile_samples

        errors: list[Exception] = []

        def keep_going(error: Exception) -> bool:
            errors.append(error)
            return True

        file = self.files[unit]
        for sample in tarfile_samples(iter([{"url": str(file.resolve())}]), handler=keep_going):
            yield self._item(self._names[unit], sample)
        if errors:
            yield Problem(file.name, "unreadable_archive", f"{type(errors[0]).__name__}: {errors[0].args[0]}")

    def identity(self) -> dict:
        return {"kind": "webdataset", "files": [[file.name, file.stat().st_size] for file in self.files]}

    def _item(self, archive: str, sample: dict) -> Item | Problem:
        key = sample["__key__"]
        id = f"{archive}/{key}"
        try:
            fields = json.loads(sample["json"]) if "json" in sample else {}
        except ValueError:
            fields = {}
        suffixes = [name for name in sample if not name.startswith("__")]
        if self.image_column is None:
            image = next((name for name in suffixes if f".{name.rsplit('.', 1)[-1]}" in IMAGE_SUFFIXES), None)
        else:
            image = self.image_column if self.image_column in sample else None
        extra = {name: None if fields.get(name) is None else str(fields[name]) for name in self.extra_columns}
        captions = self._captions(sample, fields)
        if image is None and getattr(self, "has_images", False):
            return Problem(id, "missing_image", f"the entry has {', '.join(suffixes) or 'nothing'}")
        return Item(
            id, captions, None if image is None else sample[image], None if image is None else f"{key}.{image}", extra
        )

    def _captions(self, sample: dict, fields: dict) -> list[str]:
        name = self.caption_column or "txt"
        if name in sample and name != "json":
            return sample[name].decode("utf-8", "replace").splitlines() or [""]
        for field in (name,) if self.caption_column else CAPTION_COLUMNS:
            if field in fields:
                return caption_list(fields[field])
        return []
