"""What a source gives: captioned images, or the reasons why there are none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

MAX_CAPTION = 100_000
"""Captions of more characters are left out: a whole file has been taken for a caption."""


@dataclass(frozen=True)
class Item:
    """One image with its captions, one image alone, or one entry of captions alone.

    Attributes:
        id: Unique within the source and the same on every run.
        captions: As they stand in the source; may be empty, and may hold empty strings.
        image: The encoded image (its bytes, or the file they are in), or None.
        path: Name of the image in the source, for people; None if it has none.
        extra: Further columns asked for, by name.
    """

    id: str
    captions: list[str]
    image: bytes | Path | None = None
    path: str | None = None
    extra: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something of the source that had to be left out.

    Attributes:
        id: Of the item, file or archive.
        reason: One of `REASONS`.
        detail: What exactly was found.
    """

    id: str
    reason: str
    detail: str = ""


@dataclass
class Row:
    """Captions of a file, with the name of their image and the further columns asked for."""

    file: str | None
    captions: list[str]
    extra: dict[str, str | None] = field(default_factory=dict)
    problem: Problem | None = None


HOW_TO_CAPTION = "put a text beside each image (a.txt beside a.png), or metadata.csv (file_name,caption) in the folder"
"""What to do with images alone."""

REASONS = {
    "unreadable_image": "the image cannot be decoded, or is too large to be",
    "missing_image": "there is no such file, or no image in the entry",
    "outside_image": "the image lies outside the source; --allow_outside true reads it",
    "ambiguous_entry": "an entry of an archive with several images and no telling which is meant",
    "no_caption": "an image without any caption",
    "empty_caption": "a caption of nothing but white space",
    "long_caption": "a caption of more tokens than the text encoder takes",
    "huge_caption": f"a caption of more than {MAX_CAPTION:,} characters: a whole file in its place",
    "unreadable_caption": "a caption file that is not text in UTF-8",
    "unreadable_archive": "an archive that ends early or is damaged",
}


class Source(ABC):
    """A data set in units that can be read apart, each by one process, always in the same order.

    Attributes:
        has_images: Its items have images.
        has_captions: Its items have captions.
        count: Number of items, or None if only reading them all would tell.
        not_read: Files of its folder that are neither images nor captions, by ending: `{"count", "first"}`.
        splits: Names of those that its split was chosen from; empty where it has none.
    """

    has_images: bool
    has_captions: bool
    count: int | None
    not_read: dict[str, dict] = {}
    splits: Set[str] = frozenset()

    def units(self, size: int) -> int:
        """Number of units, of `size` items each where the source can be cut anywhere."""
        return -(-self.count // size)

    def __iter__(self) -> Iterator[Item | Problem]:
        """All items, in order."""
        return (item for unit in range(self.units(1000)) for item in self.read(unit, 1000))

    @abstractmethod
    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        """Items of one unit, in order."""

    @abstractmethod
    def identity(self) -> dict:
        """JSON-able description that changes when the data changes."""

    def span(self, unit: int, size: int) -> range:
        """Places of the items of a unit."""
        return range(unit * size, min((unit + 1) * size, self.count))


@dataclass(frozen=True)
class SourceOptions:
    """What is read of a source; the usual names of the columns are tried by default.

    Attributes:
        split: Of a data set that has several; "all" for all files of a folder.
        subset: Configuration of a data set of the hub.
        image_column: Column of the images or of their file names.
        caption_column: Column of the captions.
        metadata_columns: Further columns to keep, as text.
        allow_outside: Read images that a table names outside the source's folder (`../x.png`, `/data/x.png`).
        splits: Those that are found on the way.
    """

    split: str = "train"
    subset: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    metadata_columns: Sequence[str] = ()
    allow_outside: bool = False
    splits: set[str] = field(default_factory=set, init=False)

    def extra(self, values: dict) -> dict[str, str | None]:
        """The further columns of an entry, as text."""
        found = {name: values.get(name) for name in self.metadata_columns}
        return {name: None if value is None else well_formed(str(value)) for name, value in found.items()}


def caption_list(value: object) -> list[str]:
    """Captions of one entry from whatever stands in its caption field: a string, several, or nothing."""
    if value is None or value != value:  # NaN stands for an empty cell.
        return []
    if isinstance(value, (list, tuple)):
        return [caption for part in value for caption in (caption_list(part) or [""])]
    return [well_formed(str(value))]


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold: pairs of surrogates become their character, single ones U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(name: str) -> str:
    r"""A file name that UTF-8 can hold: bytes of another encoding as `\udce9`, so that names stay distinct."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
