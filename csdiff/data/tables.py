"""Caption tables: CSV, JSON lines, JSON, parquet and plain text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csdiff.data.images import is_image_name
from csdiff.data.items import caption_list, extra_columns
from csdiff.data.text_files import lines, read_lines, read_text
from csdiff.errors import CSDiffError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".txt")
# Looked for in this order, in any case, when the columns are not named.
CAPTION_COLUMNS = (
    "captions", "caption", "text", "texts", "sentences", "sentence", "prompt", "description", "title", "comment",
)  # fmt: skip
IMAGE_COLUMNS = (
    "file_name", "image", "image_path", "filepath", "file_path", "filename", "path", "img", "file", "image_name",
    "image_file", "jpg", "png", "webp",
)  # fmt: skip
_SEPARATORS = ",\t;|"


@dataclass
class CaptionTable:
    """Rows of captions, each with the file name of its image where there is one.

    Rows that name one file are one entry with several captions, at the place of the first.

    Attributes:
        files: File name of each entry; None for a table without images.
        captions: Captions of each entry.
        extra: Further columns by name, each as long as `captions`.
    """

    files: list[str] | None
    captions: list[list[str]]
    extra: dict[str, list[str | None]] = field(default_factory=dict)

    def sha256(self) -> str:
        """Hash of the whole content."""
        digest = hashlib.sha256()
        for index, captions in enumerate(self.captions):
            row = [self.files and self.files[index], captions, *(c[index] for c in self.extra.values())]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def read_table(
    path: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    metadata_columns: Sequence[str] = (),
) -> CaptionTable:
    """Read a caption table.

    Args:
        path: `.csv`, `.tsv` (separated by commas, tabs, semicolons or bars: what makes columns of the names known),
            `.jsonl`, `.json` (a list of objects or strings), `.parquet`, or `.txt` (a caption a line, or a table whose
            first line names its columns).
        image_column: Column of image file names; the usual names are tried by default.
        caption_column: Column of captions (strings or lists of strings); the usual names are tried by default.
        metadata_columns: Further columns to keep, as text.

    Raises:
        CSDiffError: Not readable as what its name says, a column is not there, or a text of captions that begin with
            the names of images.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise CSDiffError(f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}), found {path.suffix!r}.")
    try:
        if suffix in (".csv", ".tsv", ".txt"):
            columns = _separated(path, (image_column, caption_column, *metadata_columns))
        else:
            columns = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[suffix](path)
    except (OSError, CSDiffError):
        raise
    except Exception as error:  # Each parser has its own kinds.
        reason = " ".join(str(error).split())[:300]
        raise CSDiffError(f"{path} is not a readable {suffix} table ({reason}); correct or save it again.") from error
    names = find_column(columns, image_column, IMAGE_COLUMNS, path, "image_column")
    texts = find_column(columns, caption_column, CAPTION_COLUMNS, path, "caption_column")
    for name in metadata_columns:
        find_column(columns, name, (), path, "metadata_columns")
    if names is None and texts is None:
        raise CSDiffError(
            f"{path}: expected a column of captions ({', '.join(CAPTION_COLUMNS[:3])}, ...) or of image files "
            f"({', '.join(IMAGE_COLUMNS[:3])}, ...), found {', '.join(map(repr, columns)) or 'no columns'}; name it "
            "with caption_column or image_column, and separate columns with commas, tabs, semicolons or bars."
        )
    length = len(columns[names or texts])
    captions = [caption_list(value) for value in columns[texts]] if texts else [[] for _ in range(length)]
    kept = [
        extra_columns({name: columns[name][index] for name in metadata_columns}, list(metadata_columns))
        for index in range(length if metadata_columns else 0)
    ]
    extra = {name: [row[name] for row in kept] for name in metadata_columns}
    if names is None:
        # Without an image an entry is its caption: an empty one is an empty caption, not a missing one.
        return CaptionTable(None, [entry or [""] for entry in captions], extra)
    return _grouped([_file_name(value) for value in columns[names]], captions, extra)


def joined(tables: Sequence[tuple[str, CaptionTable]]) -> CaptionTable:
    """Tables of several folders as one: the name of its folder before the file names of each."""
    if all(table.files is None for _, table in tables):
        files = None
    else:
        files = [f"{folder}{name}" for folder, table in tables for name in table.files or ()]
    captions = [entry for _, table in tables for entry in table.captions if files is None or table.files is not None]
    names = tables[0][1].extra
    extra = {name: [value for _, table in tables for value in table.extra[name]] for name in names}
    return CaptionTable(None, captions, extra) if files is None else _grouped(files, captions, extra)


def find_column(
    columns: Sequence[str] | dict, asked: str | None, usual: Sequence[str], where: object, option: str
) -> str | None:
    """The column asked for, or the first of the usual names that is there, or None.

    Raises:
        CSDiffError: The column asked for is not there.
    """
    if asked is not None:
        if asked not in columns:
            raise CSDiffError(
                f"{where}: expected the column {asked!r} ({option}), found {', '.join(columns) or 'none'}."
            )
        return asked
    lower = {name.lower(): name for name in reversed(list(columns))}
    return next((lower[name] for name in usual if name in lower), None)


def check_rows(path: Path, rows: int) -> None:
    """Refuse a parquet file of so many rows for its size that they can only be repetitions.

    Raises:
        CSDiffError: More than a million rows, of less than a byte each.
    """
    if rows > max(1_000_000, path.stat().st_size):
        raise CSDiffError(
            f"{path}: expected at least a byte a row in a file of more than a million, found {rows:,} rows in "
            f"{path.stat().st_size:,} bytes, which can only repeat themselves; write it with what differs."
        )


def _file_name(value: object) -> str:
    """File name in a cell: a string, or `{"bytes", "path"}` as `datasets` keeps images."""
    return str(value.get("path") if isinstance(value, dict) else value)


def _grouped(files: list[str], captions: list[list[str]], extra: dict[str, list]) -> CaptionTable:
    places: dict[str, int] = {}
    grouped = CaptionTable([], [], {name: [] for name in extra})
    for index, file in enumerate(files):
        if file in places:
            grouped.captions[places[file]].extend(captions[index])
            continue
        places[file] = len(places)
        grouped.files.append(file)
        grouped.captions.append(list(captions[index]))
        for name, values in extra.items():
            grouped.extra[name].append(values[index])
    return grouped


def _separated(path: Path, asked: Sequence[str | None]) -> dict[str, list]:
    text = read_text(path)
    head = text.lstrip("\n").partition("\n")[0]
    separator, known = _separator(head, path.suffix.lower(), {name for name in asked if name})
    if path.suffix.lower() == ".txt" and known < 2 and not any(asked):
        captions = lines(text)
        first = next((line for line in captions if line.strip()), "")
        if is_image_name(first.replace("\t", ",").replace("|", ",").replace(";", ",").partition(",")[0].strip()):
            raise CSDiffError(
                f"{path}: expected a caption a line, found lines that begin with an image's name ({first[:60]!r}); "
                "write the names of the columns above them, for example image,caption, and give the folder of the "
                "images as source and this file as captions_file."
            )
        return {"caption": captions}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names = reader.fieldnames or []
    columns: dict[str, list] = {name.strip(): [] for name in names}
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"line {reader.line_num} has not {len(columns)} fields separated by {separator!r}; put fields that "
                "hold the separator in quotes"
            )
        for name, value in row.items():
            columns[name.strip()].append(value)
    return columns


def _separator(head: str, suffix: str, asked: set[str]) -> tuple[str, int]:
    """The separator that makes most known names of the first line, the usual one of the suffix first; and how many."""
    known = {name.lower() for name in (*IMAGE_COLUMNS, *CAPTION_COLUMNS)}

    def names(separator: str) -> int:
        found = {name.strip() for name in next(csv.reader([head], delimiter=separator), [])}
        return len({name.lower() for name in found} & known) + 2 * len(found & asked)

    usual = "\t" if suffix == ".tsv" else ","
    best = max([usual, *_SEPARATORS.replace(usual, "")], key=names)
    return best, names(best)


def _json_lines(path: Path) -> dict[str, list]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
    return _columns(rows)


def _json(path: Path) -> dict[str, list]:
    return _columns(json.loads(read_text(path)))


def _columns(rows: object) -> dict[str, list]:
    if isinstance(rows, list) and all(isinstance(row, str) for row in rows):
        return {"caption": rows}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or of strings")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path) -> dict[str, list]:
    import pyarrow.parquet as pq

    check_rows(path, pq.read_metadata(path).num_rows)
    return pq.read_table(path).to_pydict()
