"""Webdataset shards: tar files of images and captions under common names."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from csdiff.data.images import is_image_name
from csdiff.data.items import Item, Problem, Source, SourceOptions, caption_list, printable
from csdiff.data.listing import hidden
from csdiff.data.tables import CAPTION_COLUMNS, UnreadableText, decode_text, json_fields, known_column, lines

_TEXTS = ("txt", "caption", "json")
# No image, and no text of captions, is larger; a member may claim anything.
_MAX_BYTES = 1_000_000_000


class WebDatasetSource(Source):
    """Tar files in which `key.jpg`, `key.txt` and `key.json` belong together; one unit a file.

    Members that follow each other under one key, the name up to its first dot, are an entry, as webdataset has it.
    Within one, an image and a text with the same name up to the *last* dot (`IMG.2020.01.jpg`, `IMG.2020.01.txt`) are
    an entry of their own. Captions are the lines of `key.txt`, or the caption field of `key.json`. A damaged archive
    gives the items before the damage, then a problem.

    Of the options `image_column` is the suffix of the images (by default any image suffix), `caption_column` that of
    the captions or the field of `key.json` that holds them (by default `txt`, else the usual names of the field), and
    `metadata_columns` are fields of `key.json`.
    """

    count = None

    def __init__(self, files: Sequence[Path], options: SourceOptions):
        self.files, self.options = list(files), options
        stems = [file.stem for file in self.files]
        self._names = stems if len(set(stems)) == len(stems) else [str(unit) for unit in range(len(stems))]
        # What the first entries have, the archive has: an entry without is then a problem of that entry.
        self.has_images = False
        items = [item for item in islice(self, 100) if isinstance(item, Item)]
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
        columns = filter(None, (self.options.image_column, self.options.caption_column))
        endings = tuple(f".{name}" for name in (*_TEXTS, *columns))
        try:
            with tarfile.open(file, "r:*") as tar:
                for member in tar:
                    tar.members.clear()  # It keeps every member it has seen.
                    if not member.isfile() or hidden(member.name):
                        continue
                    if is_image_name(member.name) or member.name.endswith(endings):
                        if member.size > _MAX_BYTES:
                            raise ValueError(f"{member.name} has {member.size:,} bytes, more than {_MAX_BYTES:,}")
                        yield member.name, tar.extractfile(member).read()
                # An archive ends with zeros, and a damaged header looks like its end.
                tar.fileobj.seek(tar.offset)
                block = tar.fileobj.read(tarfile.BLOCKSIZE)
                if len(block) < tarfile.BLOCKSIZE:
                    damage.append("it ends early, without its closing blocks")
                elif any(block):
                    damage.append("a header is damaged, what follows is lost")
        except FileNotFoundError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            damage.append(f"{type(error).__name__}: {error}")

    def _entries(self, key: str, members: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Entries under one key: their names, and their parts by suffix."""
        stems: dict[str, dict[str, bytes]] = {}
        for name, content in members.items():
            stem, _, suffix = name.rpartition(".")
            stems.setdefault(stem, {})[suffix] = content
        whole = [stem for stem, parts in stems.items() if any(map(_is_image, parts)) and parts.keys() & set(_TEXTS)]
        dotted = "." in f"{self.options.image_column}{self.options.caption_column}"
        own = [] if dotted else [stem for stem in whole if stem != key]
        for stem in own:
            yield stem, stems.pop(stem)
        rest = {f"{stem}.{suffix}"[len(key) + 1 :]: c for stem, parts in stems.items() for suffix, c in parts.items()}
        images = list(filter(_is_image, rest))
        if own and not images:
            return  # A `key.json` beside entries of their own describes them all.
        if self.options.image_column is None and len(stems) > 1 and key not in stems and len(images) == len(rest):
            yield from stems.items()  # Images alone, each with a number or the like in its name.
        else:
            yield key, rest

    def _item(self, id: str, key: str, parts: dict[str, bytes]) -> Item | Problem:
        images = sorted(filter(_is_image, parts), key=lambda name: name.count("."))
        if self.options.image_column is not None:
            images = [self.options.image_column] if self.options.image_column in parts else []
        elif len(images) > 1 and sum("." not in name for name in images) != 1:
            detail = f"it has the images {', '.join(images)}; name the one that is meant with image_column"
            return Problem(id, "ambiguous_entry", detail)
        try:
            fields = json_fields(decode_text(parts.get("json", b"")))
            captions = self._captions(parts, fields)
        except UnreadableText as error:
            return Problem(id, "unreadable_caption", str(error))
        extra = self.options.extra(fields)
        if images:
            return Item(id, captions, parts[images[0]], printable(f"{key}.{images[0]}"), extra)
        if not self.has_images:
            return Item(id, captions, extra=extra)
        detail = f"the entry has {', '.join(parts)} alone; an image must follow its text in the archive (--sort=name)"
        return Problem(id, "missing_image", detail)

    def _captions(self, parts: dict[str, bytes], fields: dict) -> list[str]:
        asked = self.options.caption_column
        texts = [name for name in parts if name.rpartition(".")[2] in _TEXTS[:2]]
        for name in [asked] if asked else [*_TEXTS[:2], *texts[:1]]:
            if name in parts and name != "json":
                return caption_list(lines(decode_text(parts[name]))) or [""]
        field = asked or known_column(fields, CAPTION_COLUMNS)
        return caption_list(fields.get(field))


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_image(suffix: str) -> bool:
    return is_image_name(f"a.{suffix}")
