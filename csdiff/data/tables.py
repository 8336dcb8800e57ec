"""Caption tables: CSV, JSON lines, JSON, parquet, plain text, and the formats of published data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from csdiff.data import published
from csdiff.data.images import is_image_name
from csdiff.data.items import Row, SourceOptions, caption_list
from csdiff.data.text_files import lines, read_text
from csdiff.errors import CSDiffError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".txt", ".jsonlines", ".token")
# Looked for in this order, in any case, when the columns are not named.
CAPTION_COLUMNS = (
    "captions", "caption", "text", "texts", "sentences", "sentence", "prompt", "description", "title", "comment",
)  # fmt: skip
IMAGE_COLUMNS = (
    "file_name", "image", "image_path", "filepath", "file_path", "filename", "path", "img", "file", "image_name",
    "image_file", "jpg", "png", "webp",
)  # fmt: skip


def read_table(path: Path, options: SourceOptions) -> list[Row]:
    """Rows of a caption table, or of a published caption file unless columns are named."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise CSDiffError(f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}) or .tar, found {path.suffix!r}.")
    try:
        found = _read(path, options)
        if not isinstance(found, dict):
            return grouped(published.of_split(path, found, options.split))
    except (OSError, CSDiffError):
        raise
    except Exception as error:  # Each parser has its own kinds.
        reason = " ".join(str(error).split())[:300]
        raise CSDiffError(f"{path} is not a readable {path.suffix} table ({reason}); correct it.") from error
    names, texts = find_columns(found, options, path)
    if names is None and texts is None:
        raise CSDiffError(
            f"{path}: expected a column of captions (caption, text, ...) or of image files (file_name, image, ...), "
            f"found {', '.join(map(repr, found)) or 'none'}; name it with caption_column or image_column."
        )
    rows = []
    for index in range(len(found[names or texts])):
        captions = caption_list(found[texts][index]) if texts else []
        extra = options.extra({name: found[name][index] for name in options.metadata_columns})
        if names is None:
            # Without an image an entry is its caption: an empty one is an empty caption, not a missing one.
            rows.append(Row(None, captions or [""], extra))
        else:
            file = found[names][index]
            rows.append(Row(str(file.get("path") if isinstance(file, dict) else file), captions, extra))
    return grouped(rows)


def grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows of which those that name one file are one, with all their captions, at the place of the first."""
    kept, places = [], {}
    for row in rows:
        if row.file is not None and row.file in places:
            places[row.file].captions.extend(row.captions)
        else:
            kept.append(row)
            places[row.file] = row
    return kept


def find_column(
    columns: Sequence[str] | dict, asked: str | None, usual: Sequence[str], where: object, option: str
) -> str | None:
    """The column asked for, which must be there, or the first of the usual names that is, or None."""
    if asked is not None:
        if asked not in columns:
            found = ", ".join(columns) or "none"
            raise CSDiffError(f"{where}: expected the column {asked!r} ({option}), found {found}.")
        return asked
    lower = {name.lower(): name for name in reversed(list(columns))}
    return next((lower[name] for name in usual if name in lower), None)


def find_columns(
    columns: Sequence[str] | dict, options: SourceOptions, where: object
) -> tuple[str | None, str | None]:
    """The columns of images and of captions; every column that the options name must be there."""
    for name in options.metadata_columns:
        find_column(columns, name, (), where, "metadata_columns")
    image = find_column(columns, options.image_column, IMAGE_COLUMNS, where, "image_column")
    return image, find_column(columns, options.caption_column, CAPTION_COLUMNS, where, "caption_column")


def _read(path: Path, options: SourceOptions) -> dict[str, list] | Iterable[Row]:
    """Columns of a table, or rows of a published format."""
    suffix = path.suffix.lower()
    asked = {options.image_column, options.caption_column, *options.metadata_columns} - {None}
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pydict()
    text = read_text(path)
    if suffix == ".token" or path.name.endswith(".token.txt"):
        return published.tokens(text)
    if suffix in (".jsonl", ".jsonlines"):
        rows = _json_lines(text)
        docci = suffix == ".jsonlines" and not asked and {"image_file", "description"} <= set(rows[0] if rows else ())
        return published.docci(rows) if docci else _columns(rows)
    if suffix == ".json":
        content = json.loads(text)
        found = published.coco(content) if isinstance(content, dict) and not asked else None
        return _columns(content) if found is None else found
    if suffix == ".csv" and not asked and text.partition("\n")[0].replace(" ", "").startswith("image_name|"):
        return published.bars(text)
    columns = _separated(path, text, asked)
    return published.annotations(columns) if not asked and {"raw", "filename", "split"} <= columns.keys() else columns


def _separated(path: Path, text: str, asked: set[str]) -> dict[str, list]:
    head, suffix = text.lstrip("\n").partition("\n")[0], path.suffix.lower()
    known = {name.lower() for name in (*IMAGE_COLUMNS, *CAPTION_COLUMNS)}

    def names(separator: str) -> int:
        found = {name.strip() for name in next(csv.reader([head], delimiter=separator), [])}
        return len({name.lower() for name in found} & known) + 2 * len(found & asked)

    # What makes most known names of the first line, the usual one of the suffix first.
    separator = max("\t,;|" if suffix == ".tsv" else ",\t;|", key=names)
    if suffix == ".txt" and names(separator) < 2 and not asked:
        captions = lines(text)
        first = next((line for line in captions if line.strip()), "")
        if is_image_name(first.replace("\t", ",").replace("|", ",").replace(";", ",").partition(",")[0].strip()):
            raise CSDiffError(
                f"{path}: expected a caption a line, found lines that begin with an image's name ({first[:60]!r}); "
                "write the names of the columns above them, for example image,caption."
            )
        return {"caption": captions}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns: dict[str, list] = {name.strip(): [] for name in reader.fieldnames or []}
    for row in reader:
        if None in row or None in row.values():
            found = f"line {reader.line_num} has not {len(columns)} fields separated by {separator!r}"
            raise ValueError(f"{found}; put fields that hold the separator in quotes")
        for name, value in row.items():
            columns[name.strip()].append(value)
    return columns


def json_fields(text: str) -> dict:
    """The JSON object that a text is; empty where it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_lines(text: str) -> list:
    rows = []
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _columns(rows: object) -> dict[str, list]:
    if isinstance(rows, list) and all(isinstance(row, str) for row in rows):
        return {"caption": rows}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or of strings")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}
