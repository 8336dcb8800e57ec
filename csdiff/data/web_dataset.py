"""Webdataset shards: tar files of images and captions under common names."""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path, PurePosixPath

from csdiff.data.images import is_image_name
from csdiff.data.items import Item, Problem, caption_list, extra_columns, printable
from csdiff.data.sources import Source
from csdiff.data.tables import CAPTION_COLUMNS, find_column
from csdiff.data.text_files import UnreadableText, decode_text, lines
from csdiff.data.walk import hidden

_TEXTS = ("txt", "caption", "json")
# No image, and no text of captions, is larger; a member may claim anything.
_MAX_BYTES = 1_000_000_000


class WebDatasetSource(Source):
    """Tar files in which `key.jpg`, `key.txt` and `key.json` belong together; one unit a file.

    Members that follow each other under one key, the name up to its first dot, are an entry, as webdataset has it.
    Within one, an image and a text with the same name up to the *last* dot (`IMG.2020.01.jpg`, `IMG.2020.01.txt`) are
    an entry of their own. Captions are the lines of `key.txt`, or the caption field of `key.json`. A damaged archive
    gives the items before the damage, then a problem.

    Args:
        files: In order.
        image_column: Suffix of the images; by default any image suffix.
        caption_column: Suffix of the captions, or the field of `key.json` that holds them; by default `txt`, else the
            usual names of the field.
        metadata_columns: Fields of `key.json` to keep, as text.
    """

    count = None

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        metadata_columns: Sequence[str] = (),
    ):
        self.files = list(files)
        stems = [file.stem for file in self.files]
        self._names = stems if len(set(stems)) == len(stems) else [str(unit) for unit in range(len(stems))]
        self.image_column, self.caption_column, self.extra = image_column, caption_column, list(metadata_columns)
        self.has_images = False
        # What the first entries have, the archive has: an entry without is then a problem of that entry.
        first = list(islice((item for unit in range(len(self.files)) for item in self.read(unit, 0)), 100))
        items = [item for item in first if isinstance(item, Item)]
        self.has_captions = any(item.captions for item in items)
        self.has_images = any(item.image is not None for item in items) or not items

    def units(self, size: int) -> int:
        return len(self.files)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        file, damage = self.files[unit], []
        for key, members in groupby(self._members(file, damage), lambda member: _key(member[0])):
            for name, parts in self._entries(key, dict(members)):
                yield self._item(f"{self._names[unit]}/{printable(name)}", name, parts)
        if damage:
            yield Problem(file.name, "unreadable_archive", damage[0])

    def identity(self) -> dict:
        return {"kind": "webdataset", "files": [[file.name, file.stat().st_size] for file in self.files]}

    def _members(self, file: Path, damage: list[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the members that are read; what ends the reading early goes into `damage`."""
        endings = tuple(f".{name}" for name in (*_TEXTS, self.image_column, self.caption_column) if name)
        try:
            with tarfile.open(file, "r:*") as tar:
                for member in tar:
                    tar.members.clear()  # It keeps every member it has seen.
                    if not member.isfile() or hidden(member.name):
                        continue
                    if is_image_name(member.name) or member.name.endswith(endings):
                        if member.size > _MAX_BYTES:
                            raise ValueError(
                                f"{member.name} has {member.size:,} bytes, at most {_MAX_BYTES:,} are read"
                            )
                        yield member.name, tar.extractfile(member).read()
                damage += _unread_end(tar)
        except FileNotFoundError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            damage.append(f"{type(error).__name__}: {error}")

    def _entries(self, key: str, members: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes] | str]]:
        """Entries under one key: their names, and their parts by suffix or a sentence about what is wrong."""
        stems: dict[str, dict[str, bytes]] = {}
        for name, content in members.items():
            stem, _, suffix = name.rpartition(".")
            stems.setdefault(stem, {})[suffix] = content
        by_suffix = any("." in column for column in (self.image_column, self.caption_column) if column)
        own = [
            stem
            for stem, parts in stems.items()
            if stem != key
            and not by_suffix
            and any(map(_is_image_suffix, parts))
            and any(suffix in _TEXTS for suffix in parts)
        ]
        for stem in own:
            yield stem, stems.pop(stem)
        rest = {f"{stem}.{suffix}"[len(key) + 1 :]: c for stem, parts in stems.items() for suffix, c in parts.items()}
        images = [name for name in rest if _is_image_suffix(name)]
        texts = [name for name in rest if name.rpartition(".")[2] in _TEXTS]
        plain = [name for name in images if "." not in name]
        if not rest or (own and not images):
            return  # A `key.json` beside entries of their own describes them all.
        if len(images) > 1 and not texts and not plain and not self.image_column:
            for name in images:
                yield f"{key}.{name.rpartition('.')[0]}", {name.rpartition(".")[2]: rest[name]}
        elif len(images) > 1 and len(plain) != 1 and self.image_column not in rest:
            yield key, f"it has the images {', '.join(images)}; name the one that is meant with image_column"
        else:
            yield key, rest

    def _item(self, id: str, key: str, parts: dict[str, bytes] | str) -> Item | Problem:
        if isinstance(parts, str):
            return Problem(id, "ambiguous_entry", parts)
        try:
            fields = json.loads(decode_text(parts["json"])) if "json" in parts else {}
        except (ValueError, RecursionError):
            fields = {}
        fields = fields if isinstance(fields, dict) else {}
        images = sorted((name for name in parts if _is_image_suffix(name)), key=lambda name: name.count("."))
        if self.image_column is not None:
            images = [self.image_column] if self.image_column in parts else []
        try:
            captions = self._captions(parts, fields)
        except UnreadableText as error:
            return Problem(id, "unreadable_caption", str(error))
        if not images:
            if self.has_images:
                return Problem(
                    id,
                    "missing_image",
                    f"the entry has {', '.join(parts)} alone; an image and its text must follow each other in the "
                    "archive (tar --sort=name)",
                )
            return Item(id, captions, extra=extra_columns(fields, self.extra))
        path = printable(f"{key}.{images[0]}")
        return Item(id, captions, parts[images[0]], path, extra_columns(fields, self.extra))

    def _captions(self, parts: dict[str, bytes], fields: dict) -> list[str]:
        texts = [name for name in parts if name.rpartition(".")[2] in _TEXTS[:2]]
        names = [self.caption_column] if self.caption_column else [*_TEXTS[:2], *texts[:1]]
        for name in names:
            if name in parts and name != "json":
                return caption_list(lines(decode_text(parts[name]))) or [""]
        if self.caption_column:
            return caption_list(fields.get(self.caption_column))
        field = find_column(fields, None, CAPTION_COLUMNS, "", "caption_column")
        return [] if field is None else caption_list(fields[field])


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return name[: len(name) - len(path.name)] + path.name.partition(".")[0]


def _is_image_suffix(name: str) -> bool:
    return is_image_name(f"a.{name}")


def _unread_end(tar: tarfile.TarFile) -> list[str]:
    """What is wrong where reading stopped: an archive ends with zeros, a damaged header looks like the end."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return ["it ends early, without its closing blocks"]
    return ["a header is damaged, what follows is lost"] if any(block) else []
