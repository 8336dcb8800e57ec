"""Rows: of caption tables and the formats in which data sets are published, and of files with images inside."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from csdiff.data.images import is_image_name
from csdiff.data.items import Item, Problem, Row, Source, SourceOptions, caption_list, printable
from csdiff.data.listing import image_file, no_split
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

_ROWS_AT_ONCE = 64

# UTF-16's mark begins as UTF-32's.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class UnreadableText(ValueError):
    """Bytes that are not text in a known encoding; the message says where, and what to do."""


def decode_text(content: bytes) -> str:
    r"""Text in UTF-8, or in UTF-16 or UTF-32 where the file says so by its mark or by its zero bytes.

    Lines end with `\n`; `\r\n` becomes it, and `\r` where a text has nothing else. Other encodings are not guessed:
    what decodes as Windows-1252 may be anything.

    Raises:
        UnreadableText: with the line and the cure.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    start = content[:1000]
    if encoding == "utf-8" and start.count(0) > len(start) / 4:
        # ASCII in UTF-16 has a zero in every second byte.
        encoding = "utf-16-be" if start[::2].count(0) > start[1::2].count(0) else "utf-16-le"
    try:
        text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableText(
            f"line {line}: expected {encoding.upper()}, found the byte 0x{content[error.start]:02x}; save it as UTF-8 "
            "(Excel: CSV UTF-8; or iconv -f WINDOWS-1252 -t UTF-8, if that is what it is)"
        ) from error
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def lines(text: str) -> list[str]:
    """Lines of a text, without an empty one after the last newline; no other character ends one."""
    return text.removesuffix("\n").split("\n") if text else []


def json_fields(text: str) -> dict:
    """The JSON object that a text is; empty where it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_table(path: Path, options: SourceOptions) -> list[Row]:
    """Rows of a caption table, or of a published caption file unless columns are named."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise CSDiffError(f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}) or .tar, found {path.suffix!r}.")
    try:
        found = _read(path, options)
    except (OSError, CSDiffError):
        raise
    except Exception as error:  # Each parser has its own kinds.
        reason = " ".join(str(error).split())[:300]
        raise CSDiffError(f"{path} is not a readable {path.suffix} table ({reason}); correct it.") from error
    if not found:
        return []
    columns = list(dict.fromkeys(name for row in found for name in row))
    image, caption = find_columns(columns, options, path)
    if image is None and caption is None:
        raise CSDiffError(
            f"{path}: expected a column of captions (caption, text, ...) or of image files (file_name, image, ...), "
            f"found {', '.join(map(repr, columns)) or 'none'}; name it with caption_column or image_column."
        )
    rows = []
    for values in found:
        captions, file = caption_list(values.get(caption)), values.get(image)
        if isinstance(file, dict):
            file = file.get("path")
        if image is None:
            # Without an image an entry is its caption: an empty one is an empty caption, not a missing one.
            captions = captions or [""]
        rows.append(Row(None if image is None else str(file), captions, options.extra(values)))
    return rows


def known_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first of the usual names, in any case, that there is."""
    lower = {name.lower(): name for name in reversed(list(columns))}
    return next((lower[name] for name in names if name in lower), None)


def find_columns(columns: Sequence[str], options: SourceOptions, where: object) -> tuple[str | None, str | None]:
    """The columns of images and of captions; every column that the options name must be there."""
    asked = {"image_column": options.image_column, "caption_column": options.caption_column}
    for option, name in [*asked.items(), *(("metadata_columns", name) for name in options.metadata_columns)]:
        if name not in (None, *columns):
            found = ", ".join(columns) or "none"
            raise CSDiffError(f"{where}: expected the column {name!r} ({option}), found {found}.")
    image = options.image_column or known_column(columns, IMAGE_COLUMNS)
    return image, options.caption_column or known_column(columns, CAPTION_COLUMNS)


def _read(path: Path, options: SourceOptions) -> list[dict]:
    """Rows of a table by the names of their columns. Unless columns are named, of a split of a published format too.

    - COCO captions: `annotations/captions_val2017.json` (`images`, `annotations`).
    - COCO and Flickr30k in Karpathy's form: `dataset_coco.json`, `dataset_flickr30k.json` (`images` with `sentences`).
    - Flickr30k: `flickr_annotations_30k.csv` (`raw`, `filename`, `split`), `results.csv` (bars between columns), or
      `results_20130124.token`, as Flickr8k has it.
    - DOCCI: `docci_descriptions.jsonlines` (`image_file`, `description`, `split`).
    """
    suffix = path.suffix.lower()
    asked = {options.image_column, options.caption_column, *options.metadata_columns} - {None}
    if suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = decode_text(path.read_bytes())
    if suffix == ".token" or path.name.endswith(".token.txt"):
        pairs = (line.split("\t", 1) for line in lines(text) if line.strip())
        return [{"image": name.rsplit("#", 1)[0], "caption": caption.strip()} for name, caption in pairs]
    if suffix in (".json", ".jsonl", ".jsonlines"):
        content = json.loads(text) if suffix == ".json" else _json_lines(text)
        if suffix == ".json" and isinstance(content, dict) and not asked and (rows := _coco(content)) is not None:
            return _of_split(path, rows, options)
        if isinstance(content, list) and all(isinstance(row, str) for row in content):
            return [{"caption": row} for row in content]
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError("expected a list of objects, or of strings")
        if suffix == ".jsonlines" and not asked and content and {"image_file", "description"} <= content[0].keys():
            rows = [{**row, "description": row["description"].strip()} for row in content]
            return _of_split(path, rows, options)
        return content
    if suffix == ".csv" and not asked and text.partition("\n")[0].replace(" ", "").startswith("image_name|"):
        # One line of the published file lacks its second bar: "...jpg| 4   A dog runs ...".
        parts = [[part.strip() for part in line.split("|", 2)] for line in lines(text)[1:] if line.strip()]
        texts = (part[2] if len(part) == 3 else part[1].lstrip("01234 ") for part in parts)
        return [{"image": part[0], "caption": caption} for part, caption in zip(parts, texts, strict=True)]
    rows = _separated(path, text, asked)
    if asked or not rows or not {"raw", "filename", "split"} <= rows[0].keys():
        return rows
    captions = ([caption.strip() for caption in json.loads(row["raw"])] for row in rows)
    rows = [{**row, "captions": texts} for row, texts in zip(rows, captions, strict=True)]
    return _of_split(path, rows, options)


def _separated(path: Path, text: str, asked: set[str]) -> list[dict]:
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
        return [{"caption": caption} for caption in captions]
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    rows = []
    for row in reader:
        if None in row or None in row.values():
            found = f"line {reader.line_num} has not {len(reader.fieldnames)} fields separated by {separator!r}"
            raise ValueError(f"{found}; put fields that hold the separator in quotes")
        rows.append(row)
    return rows


def _json_lines(text: str) -> list:
    rows = []
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _coco(content: dict) -> list[dict] | None:
    """COCO captions or Karpathy's form; None where a JSON object is neither."""
    images = content.get("images")
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        rows = {image["id"]: {"image": image["file_name"], "captions": []} for image in images}
        for annotation in content["annotations"]:
            rows[annotation["image_id"]]["captions"].append(annotation["caption"].strip())
        return [row for row in rows.values() if row["captions"]]
    if not images or "sentences" not in images[0]:
        return None
    return [
        {
            "image": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
            "captions": [sentence["raw"].strip() for sentence in image["sentences"]],
            "split": image.get("split"),
        }
        for image in images
    ]


def _of_split(path: Path, rows: list[dict], options: SourceOptions) -> list[dict]:
    """Rows of a split, all where none states one. COCO's "restval" belongs to "train", as everyone trains."""
    splits, split = {row["split"] for row in rows if row.get("split")}, options.split
    options.splits.update(splits)
    if not splits or split == "all":
        return rows
    wanted = {split, "restval"} if split == "train" else {split}
    return [row for row in rows if row.get("split") in wanted] or no_split(path, split, sorted(splits))


class RowSource(Source):
    """Rows of which a column is the image: `{"bytes", "path"}`, bytes, or a file below one of the folders."""

    def __init__(self, image: str | None, caption: str | None, options: SourceOptions, folders: Sequence[Path]):
        self.image, self.caption, self.options, self.folders = image, caption, options, folders
        self.columns = list(dict.fromkeys(filter(None, (image, self.caption, *options.metadata_columns))))
        self.has_images, self.has_captions = image is not None, self.caption is not None

    def item(self, index: int, values: dict) -> Item | Problem:
        """Item of a row."""
        id, extra = str(index), self.options.extra(values)
        captions = caption_list(values[self.caption]) if self.caption else []
        if self.image is None:
            return Item(id, captions or [""], extra=extra)
        image = values[self.image]
        if not isinstance(image, dict):
            image = {"path": image} if isinstance(image, str) else {"bytes": image}
        content, path = image.get("bytes"), image.get("path")
        label = None if path is None else printable(path)
        if isinstance(content, bytes):
            return Item(id, captions, content, label, extra)
        if path is None:
            return Problem(id, "missing_image", f"row {index} has no image")
        file = image_file(id, path, self.folders, self.options.allow_outside)
        return file if isinstance(file, Problem) else Item(id, captions, file, label, extra)


class ParquetSource(RowSource):
    """Parquet files with a column of encoded images, all with the same columns; a unit reads its row groups only."""

    def __init__(self, files: Sequence[Path], options: SourceOptions):
        self.files = list(files)
        self.groups: list[tuple[Path, int, int, int]] = []
        """File, number, first row and last row + 1 of every row group."""
        self.count = 0
        for file in self.files:
            footer = parquet_footer(file)
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                self.groups.append((file, group, self.count, self.count + rows))
                self.count += rows
        columns = find_columns(pq.read_schema(self.files[0]).names, options, self.files[0])
        super().__init__(*columns, options, list(dict.fromkeys(file.parent for file in self.files)))

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        span = self.span(unit, size)
        for file, group, row, end in self.groups:
            if row >= span.stop or end <= span.start:
                continue
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self.columns):
                    if row < span.stop and row + len(batch) > span.start:
                        for index, values in enumerate(batch.to_pylist(), row):
                            if index in span:
                                yield self.item(index, values)
                    row += len(batch)

    def identity(self) -> dict:
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "items": self.count, "files": files}


class HuggingFaceSource(RowSource):
    """A `datasets.Dataset` with captions, images, or both; images are kept encoded until they are needed."""

    def __init__(self, dataset, name: str, options: SourceOptions, folders: Sequence[Path]):
        from datasets import Image

        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        image, caption = find_columns(dataset.column_names, options, name)
        if options.image_column is None:
            image = find_columns(images, SourceOptions(), name)[0] or next(iter(images), None)
        super().__init__(image, caption, options, folders)
        dataset = dataset.select_columns(self.columns)
        self.dataset = dataset.cast_column(image, Image(decode=False)) if image in images else dataset
        self.name, self.count = name, len(dataset)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        for index in self.span(unit, size):
            yield self.item(index, self.dataset[index])

    def identity(self) -> dict:
        known = {"kind": "huggingface", "name": self.name, "items": self.count}
        return {**known, "version": str(self.dataset.info.version), "columns": [self.image, self.caption]}


def parquet_footer(file: Path):
    """Metadata of a parquet file, refused in one sentence if it is none."""
    try:
        return pq.read_metadata(file)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CSDiffError(f"{file} is not a readable parquet file ({error}); download or write it again.") from error
