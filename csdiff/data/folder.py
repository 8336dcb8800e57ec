"""Images in a folder, captioned by tables, by files beside them, or not at all; and captions alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from csdiff.data.images import is_image_content, is_image_name
from csdiff.data.items import Item, Problem, caption_list, printable
from csdiff.data.sources import IndexedSource
from csdiff.data.tables import CAPTION_COLUMNS, CaptionTable, find_column
from csdiff.data.text_files import UnreadableText, decode_text, lines, read_text
from csdiff.data.walk import by_ending, inside
from csdiff.errors import CSDiffError

# `a.txt` or `a.png.txt` beside `a.png`; JSON as img2dataset writes it, where there is no text.
_CAPTION_SUFFIXES = (".txt", ".caption")


class ImageFolderSource(IndexedSource):
    """Images in a folder, with a table of their captions.

    The rows of the table are the items, and a file that is not there is a problem.

    Args:
        folder: Of the images.
        table: Of their captions; file names are relative to the folder.
        others: Names of the other files in the folder, which are not read.
        allow_outside: Read images that the table names outside the folder.
    """

    has_images = True

    def __init__(self, folder: Path, table: CaptionTable, others: Sequence[str] = (), allow_outside: bool = False):
        self.folder, self.table, self.allow_outside = folder, table, allow_outside
        self.has_captions = any(table.captions)
        self.count = len(table.captions)
        self.not_read = by_ending(map(printable, others))
        self.problems: dict[str, Problem] = {}

    def __getitem__(self, index: int) -> Item | Problem:
        name = self.table.files[index]
        id = printable(name)
        if name in self.problems:
            return self.problems[name]
        file = inside(self.folder, name, self.allow_outside)
        if file is None:
            return Problem(
                id, "outside_image", f"it leads out of {self.folder}; --allow_outside true reads it, if you trust it"
            )
        if not file.is_file():
            return Problem(id, "missing_image", f"no such file: {printable(str(file))}")
        extra = {column: values[index] for column, values in self.table.extra.items()}
        return Item(id, self.table.captions[index], file, id, extra)

    def identity(self) -> dict:
        return {"kind": "folder", "items": self.count, "sha256": self.table.sha256()}


def uncaptioned_folder(folder: Path, names: Sequence[str]) -> ImageFolderSource:
    """Images with the captions that lie in files beside them.

    `a.txt`, `a.caption` or `a.png.txt` beside `a.png` holds its captions, one a line; else the caption of `a.json`.

    Args:
        folder: Of the images.
        names: Of all its files.

    Raises:
        CSDiffError: Not one image, or none with a caption although another file of the folder has them.
    """
    images = [name for name in names if is_image_name(name)]
    rest = sorted(set(names) - set(images))
    images = sorted(images + [name for name in rest if _may_be_image(name) and is_image_content(folder / name)])
    if not images:
        found = ", ".join(f"{entry['count']} {ending}" for ending, entry in list(by_ending(rest).items())[:10])
        raise CSDiffError(f"{folder}: expected images, found {found or 'nothing'}.")
    # Endings in any case, so that A.TXT is found beside A.JPG.
    beside = {str(PurePosixPath(name).with_suffix("")) + PurePosixPath(name).suffix.lower(): name for name in rest}
    used, problems, captions = set(), {}, []
    for image in images:
        stem = image.removesuffix(PurePosixPath(image).suffix)
        places = [name + suffix for suffix in _CAPTION_SUFFIXES for name in (stem, image)]
        file = next((beside[place] for place in (*places, stem + ".json") if place in beside), None)
        used |= {beside[place] for place in (*places, stem + ".json") if place in beside}
        try:
            captions.append([] if file is None else _captions(folder / file))
        except UnreadableText as error:
            captions.append([""])
            problems[image] = Problem(printable(image), "unreadable_caption", f"{file}: {error}")
    others = [name for name in rest if name not in used and name not in images]
    if not any(captions):
        _check_no_captions(folder, images, others)
    source = ImageFolderSource(folder, CaptionTable(images, captions), others)
    source.problems = problems
    return source


def _may_be_image(name: str) -> bool:
    """Whether it is worth opening: not what is read as text or data anyway."""
    return PurePosixPath(name).suffix.lower() not in (*_CAPTION_SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".md")


def _captions(file: Path) -> list[str]:
    """Captions of a file beside an image; [""] where it is there and empty."""
    text = read_text(file)
    if file.suffix.lower() != ".json":
        return caption_list([line for line in lines(text) if line.strip()]) or [""]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    name = find_column(content, None, CAPTION_COLUMNS, file, "caption_column") if isinstance(content, dict) else None
    return [] if name is None else caption_list(content[name])


def _check_no_captions(folder: Path, images: Sequence[str], others: Sequence[str]) -> None:
    """Refuse images without captions beside a file that names them: its captions would be lost without a word."""
    stems = {PurePosixPath(name).stem for name in images}
    known = {PurePosixPath(name).name for name in images}
    for name in others:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in _CAPTION_SUFFIXES and PurePosixPath(name).stem in stems:
            raise CSDiffError(
                f"{folder}: expected captions beside their images, found {name}, which has the name of an image in "
                "another folder; put the texts beside the images, or write metadata.csv (file_name,caption)."
            )
        if suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".token", ".caption"):
            with (folder / name).open("rb") as file:
                start = file.read(65536)
            try:
                words = decode_text(start[: start.rfind(b"\n") + 1] or start)
            except UnreadableText:
                words = start.decode("latin-1")
            if any(image in words for image in known):
                raise CSDiffError(
                    f"{folder}: expected captions in metadata.csv, .jsonl or .parquet or beside the images, found "
                    f"{name}, which names images of the folder; give it as captions_file (and the folder that its "
                    "names are relative to as source), or move it away to read the images alone."
                )


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
