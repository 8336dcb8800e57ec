"""Caption tables: CSV, JSON lines, JSON, parquet and plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csdiff.data.items import caption_list
from csdiff.errors import CSDiffError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".txt")
# Looked for in this order, in any case, when the columns are not named.
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "sentences", "sentence", "prompt", "description")
IMAGE_COLUMNS = ("file_name", "image", "image_path", "filepath", "file_path", "filename", "path", "img", "file")


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
            row = [
                None if self.files is None else self.files[index],
                captions,
                *(c[index] for c in self.extra.values()),
            ]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def read_table(
    path: Path, image_column: str | None = None, caption_column: str | None = None, extra_columns: Sequence[str] = ()
) -> CaptionTable:
    """Read a caption table.

    Args:
        path: `.csv`, `.tsv`, `.jsonl`, `.json` (a list of objects or strings), `.parquet`, or `.txt` (a caption a
            line).
        image_column: Column of image file names; the usual names are tried by default.
        caption_column: Column of captions (strings or lists of strings); the usual names are tried by default.
        extra_columns: Further columns to keep, as text.

    Raises:
        CSDiffError: Not readable as what its name says, or a column is not there.
    """
    try:
        columns = _READERS[path.suffix.lower()](path)
    except KeyError:
        raise CSDiffError(f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}), found {path.suffix!r}.") from None
    except OSError:
        raise
    except Exception as error:  # Each parser has its own kinds.
        reason = " ".join(str(error).split())[:300]
        raise CSDiffError(
            f"{path} is not a readable {path.suffix} table ({reason}); correct or save it again."
        ) from error
    names = find_column(columns, image_column, IMAGE_COLUMNS, path, "image_column")
    texts = find_column(columns, caption_column, CAPTION_COLUMNS, path, "caption_column")
    for name in extra_columns:
        find_column(columns, name, (), path, "metadata_columns")
    if names is None and texts is None:
        raise CSDiffError(
            f"{path}: expected a column of captions ({', '.join(CAPTION_COLUMNS[:3])}, ...) or of image files "
            f"({', '.join(IMAGE_COLUMNS[:3])}, ...), found {', '.join(columns) or 'no columns'}; "
            "name it with caption_column."
        )
    length = len(next(iter(columns.values())))
    captions = [caption_list(value) for value in columns[texts]] if texts else [[] for _ in range(length)]
    if texts and names is None:
        # Without an image an entry is its caption: an empty one is an empty caption, not a missing one.
        captions = [entry or [""] for entry in captions]
    extra = {name: [None if value is None else str(value) for value in columns[name]] for name in extra_columns}
    if names is None:
        return CaptionTable(None, captions, extra)
    return _grouped([str(name) for name in columns[names]], captions, extra)


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


def _read_csv(path: Path, delimiter: str = ",") -> dict[str, list]:
    import csv

    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns: dict[str, list] = {name: [] for name in reader.fieldnames or []}
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not {len(columns)} fields")
            for name, value in row.items():
                columns[name].append(value)
    return columns


def _read_json_lines(path: Path) -> dict[str, list]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    return _columns(rows)


def _read_json(path: Path) -> dict[str, list]:
    return _columns(json.loads(path.read_text(encoding="utf-8-sig")))


def _columns(rows: object) -> dict[str, list]:
    if isinstance(rows, list) and all(isinstance(row, str) for row in rows):
        return {"caption": rows}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or of strings")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> dict[str, list]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pydict()


def _read_text(path: Path) -> dict[str, list]:
    return {"caption": path.read_text(encoding="utf-8-sig").splitlines()}


_READERS = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
