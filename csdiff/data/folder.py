"""Images in a folder, captioned by tables, by files beside them, or not at all; and captions alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from csdiff.data.images import is_image_content, is_image_name
from csdiff.data.items import Item, Problem, Row, Source, SourceOptions, caption_list, printable
from csdiff.data.listing import by_ending, image_file, place_of, suffix_of
from csdiff.data.tables import (
    CAPTION_COLUMNS,
    UnreadableText,
    decode_text,
    json_fields,
    known_column,
    lines,
    read_table,
)
from csdiff.errors import CSDiffError

# `a.txt` or `a.png.txt` beside `a.png`; JSON as img2dataset writes it, where there is no text.
_CAPTION_SUFFIXES = (".txt", ".caption")
# Where the images of published caption files lie, beside the file or one folder up.
_FOLDERS = ("images", "Images", "flickr30k-images", "flickr30k_images", "test_images")
_FOLDERS += ("train2014", "val2014", "train2017", "val2017")


class TableSource(Source):
    """Rows of captions, with the images that they name in a folder (None: captions alone).

    `others` are names of files that are not read.
    """

    def __init__(
        self, rows: list[Row], folder: Path | None = None, others: Sequence[str] = (), allow_outside: bool = False
    ):
        self.rows, self.folder, self.allow_outside = rows, folder, allow_outside
        self.has_images, self.has_captions = folder is not None, any(row.captions for row in rows)
        self.count, self.not_read = len(rows), by_ending(others)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        for index in self.span(unit, size):
            row = self.rows[index]
            if self.folder is None:
                yield Item(str(index), row.captions, extra=row.extra)
                continue
            id = printable(row.file)
            file = row.problem or image_file(id, row.file, [self.folder], self.allow_outside)
            yield file if isinstance(file, Problem) else Item(id, row.captions, file, id, row.extra)

    def identity(self) -> dict:
        kind, digest = "captions" if self.folder is None else "folder", hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.file, row.captions, *row.extra.values()]).encode())
        return {"kind": kind, "items": self.count, "sha256": digest.hexdigest()}


def table_source(
    folder: Path,
    tables: Sequence[str | Path],
    options: SourceOptions,
    names: Sequence[str] = (),
    images: bool = False,
) -> TableSource:
    """Captions of tables, with the images that they name relative to themselves, or to `folder` for a table elsewhere.

    `names` are those of the files in the folder, where they are known; with `images` captions alone are refused.
    """
    first, rows = folder / tables[0], []
    for table in tables:
        # Before the file names of a table stands the name of its folder.
        parent = "" if Path(table).is_absolute() else str(table)[: -len(PurePosixPath(table).name)]
        for row in read_table(folder / table, options):
            rows.append(Row(row.file and f"{parent}{row.file}", row.captions, row.extra))
    if not rows:
        raise CSDiffError(f"{first}: expected at least one row, found none.")
    # Rows that name one image are one, with all their captions, at the place of the first.
    files: dict[str, Row] = {}
    for row in rows:
        if row.file in files:
            files[row.file].captions.extend(row.captions)
        elif row.file is not None:
            files[row.file] = row
    if not files:
        # Captions that cannot be matched would drop the images without a word.
        if images or any(map(is_image_name, names)):
            raise CSDiffError(
                f"{first}: expected a column that names the image of each caption, found captions alone, which cannot "
                "be matched to the images; add the column, or name it with image_column."
            )
        return TableSource(rows)
    if not names and not images:
        folder = _image_folder(folder, first, list(files))
    known = {*files, *tables}
    others = [name for name in names if name not in known]
    return TableSource(list(files.values()), folder, others, options.allow_outside)


def _image_folder(folder: Path, table: Path, names: Sequence[str]) -> Path:
    """Where the images of a table lie: the folder or a usual place, where one of the first thousand is."""
    # captions_val2017.json belongs to val2017.
    own, places = table.stem.removeprefix("captions_"), (table.parent, table.parent.parent)
    inner = (place / name for place in places for name in _FOLDERS)
    for place in (folder, *(place / own for place in places), *places, *inner):
        # A few may be missing.
        if any(place_of(place, name).exists() for name in names[:1000]):
            return place
    raise CSDiffError(
        f"{table}: expected its images beside it ({names[0]} in images, ...), found none; give the folder of the "
        "images as source and this file as captions_file."
    )


def urban(folder: Path) -> TableSource:
    """Urban-1k as published: a folder with `image/1.jpg` and `caption/1.txt`."""
    images = {file.stem: file.name for file in (folder / "image").iterdir() if is_image_name(file.name)}
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    # One long caption an image, over several lines in some files.
    rows = [Row(images[t.stem], [" ".join(decode_text(t.read_bytes()).split())]) for t in texts if t.stem in images]
    return TableSource(rows, folder / "image")


def uncaptioned_folder(folder: Path, names: Sequence[str]) -> TableSource:
    """Images with the captions that lie in files beside them."""
    # What is read as text or data anyway is not opened as an image.
    texts = (*_CAPTION_SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".md")
    images = [n for n in names if is_image_name(n) or (suffix_of(n) not in texts and is_image_content(folder / n))]
    rest = sorted(set(names) - set(images))
    if not images:
        found = ", ".join(f"{entry['count']} {ending}" for ending, entry in list(by_ending(rest).items())[:10])
        raise CSDiffError(f"{folder}: expected images, found {found or 'nothing'}.")
    # Endings in any case, so that A.TXT is found beside A.JPG.
    beside = {str(PurePosixPath(name).with_suffix("")) + suffix_of(name): name for name in rest}
    used, rows = set(), []
    for image in sorted(images):
        stem = image.removesuffix(PurePosixPath(image).suffix)
        places = [name + suffix for suffix in _CAPTION_SUFFIXES for name in (stem, image)]
        files = [beside[place] for place in (*places, stem + ".json") if place in beside]
        used.update(files)
        try:
            rows.append(Row(image, _captions(folder / files[0]) if files else []))
        except UnreadableText as error:
            problem = Problem(printable(image), "unreadable_caption", f"{files[0]}: {error}")
            rows.append(Row(image, [""], problem=problem))
    others = [name for name in rest if name not in used]
    if not any(row.captions for row in rows):
        _check_no_captions(folder, images, others)
    return TableSource(rows, folder, others)


def _captions(file: Path) -> list[str]:
    """Captions of a file beside an image; [""] where it is there and empty."""
    text = decode_text(file.read_bytes())
    if file.suffix.lower() != ".json":
        return caption_list([line for line in lines(text) if line.strip()]) or [""]
    content = json_fields(text)
    return caption_list(content.get(known_column(content, CAPTION_COLUMNS)))


def _check_no_captions(folder: Path, images: Sequence[str], others: Sequence[str]) -> None:
    """Refuse images without captions beside a file that names them: its captions would be lost without a word."""
    stems = {PurePosixPath(name).stem for name in images}
    known = {os.fsencode(PurePosixPath(name).name) for name in images}
    for name in others:
        suffix = suffix_of(name)
        if suffix in _CAPTION_SUFFIXES and PurePosixPath(name).stem in stems:
            raise CSDiffError(
                f"{folder}: expected captions beside their images, found {name} in another folder; put the texts "
                "beside the images, or write metadata.csv (file_name,caption)."
            )
        if suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".jsonlines", ".token", ".caption"):
            with (folder / name).open("rb") as file:
                # Without zeros UTF-16 is ASCII, where it can be.
                start = file.read(65536).replace(b"\0", b"")
            if any(image in start for image in known):
                raise CSDiffError(
                    f"{folder}: expected captions in metadata.csv or beside the images, or none, found {name}, which "
                    "names images; give it as captions_file, or move it away."
                )
