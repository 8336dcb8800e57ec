"""Telling what kind of source a path or id is, and opening it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from csdiff.data.folder import TABLE_NAMES, CaptionSource, ImageFolderSource
from csdiff.data.sources import Source
from csdiff.data.tables import IMAGE_COLUMNS, TABLE_SUFFIXES, find_column, read_table
from csdiff.errors import CSDiffError


def open_source(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    captions_file: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    metadata_columns: Sequence[str] = (),
) -> Source:
    """Open captions and images in any of the forms that people keep them in.

    Args:
        source: One of

            - a folder of images, captioned by `metadata.jsonl` / `.csv` / `.parquet` / `.json` in it, by
              `captions_file`, by text files beside the images, or not at all;
            - a table (`.jsonl`, `.csv`, `.tsv`, `.json`, `.parquet`) of captions and image files, relative to its
            folder; - a table or `.txt` file of captions alone;
            - a parquet file, or a folder of them named after their splits, with the images inside;
            - webdataset shards: a `.tar` file, a folder of them, or a pattern such as `data/{00000..00099}.tar`;
            - a folder written by `datasets.Dataset.save_to_disk`, or the id of a data set on the hub;
            - COCO captions, Flickr30k, Urban-1k or DOCCI as they are published, see `csdiff.data.benchmark_sets`.
        split: Of a data set that has several.
        subset: Configuration of a data set on the hub.
        captions_file: Table for a folder of images, when it is not in the folder.
        image_column: Column of the images or of their file names; the usual names are tried by default.
        caption_column: Column of the captions; the usual names are tried by default.
        metadata_columns: Further columns to keep, as text.

    Raises:
        CSDiffError: Nothing there, no such split or column, or nothing that is known.
    """
    columns = (image_column, caption_column, metadata_columns)
    path = Path(source).expanduser()
    if captions_file is not None:
        if not path.is_dir():
            raise CSDiffError(f"{source}: expected a folder of images for captions_file, found none.")
        if Path(captions_file).is_file() and (found := _benchmark(Path(captions_file), split, columns, path)):
            return found
        return _table_source(Path(captions_file), path, columns)
    if path.exists() and (found := _benchmark(path, split, columns)):
        return found
    if path.is_dir():
        return _open_folder(path, split, columns)
    if path.is_file():
        return _open_file(path, columns)
    if str(source).endswith(".tar"):
        return _open_shards(str(source), columns)
    if str(source).count("/") <= 1 and not str(source).startswith((".", "/", "~")) and not path.suffix:
        return _open_hub(str(source), subset, split, columns)
    raise CSDiffError(
        f"{source}: expected a folder, a file or the id of a data set on the hub, found nothing; check the path."
    )


def _benchmark(path: Path, split: str, columns: tuple, images: Path | None = None) -> Source | None:
    """A published data set, unless columns are named: those are of a table."""
    from csdiff.data.benchmark_sets import benchmark_table

    found = None if any(columns) else benchmark_table(path, split, images)
    return None if found is None else ImageFolderSource(*found)


def _open_folder(path: Path, split: str, columns: tuple) -> Source:
    for name in TABLE_NAMES:
        if (path / name).is_file():
            return _table_source(path / name, path, columns)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split, columns)
    shards = sorted(path.glob("*.tar"))
    if shards:
        return _web_dataset(shards, columns)
    tables = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if tables:
        named = [table for table in tables if re.fullmatch(rf"{re.escape(split)}(-.*)?", table.stem)]
        if not named:
            found = ", ".join(table.name for table in tables[:10])
            raise CSDiffError(
                f"{path}: expected parquet files of the split {split!r} ({split}*.parquet), found {found}."
            )
        return _open_parquet(named, columns)
    if columns[2]:
        raise CSDiffError(f"{path}: metadata_columns need a table ({', '.join(TABLE_NAMES)}), found none.")
    return ImageFolderSource(path)


def _open_file(path: Path, columns: tuple) -> Source:
    if path.suffix == ".tar":
        return _web_dataset([path], columns)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise CSDiffError(
            f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}) or a .tar file, found {path.suffix!r}."
        )
    if path.suffix.lower() == ".parquet":
        return _open_parquet([path], columns)
    return _table_source(path, path.parent, columns)


def _open_parquet(files: list[Path], columns: tuple) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from csdiff.data.parquet import ParquetSource, parquet_footer

    parquet_footer(files[0])
    schema = pq.read_schema(files[0])
    image = find_column(schema.names, columns[0], IMAGE_COLUMNS, files[0], "image_column")
    kind = None if image is None else schema.field(image).type
    if kind is not None and (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return ParquetSource(files, *columns)
    if len(files) > 1:
        raise CSDiffError(
            f"{files[0].parent}: expected a column of image bytes in the {len(files)} parquet files of the split, "
            f"found {', '.join(schema.names)}; give one file."
        )
    return _table_source(files[0], files[0].parent, columns)


def _table_source(table: Path, folder: Path, columns: tuple) -> Source:
    content = read_table(table, *columns)
    if not content.captions:
        raise CSDiffError(f"{table}: expected at least one row, found none.")
    return CaptionSource(content) if content.files is None else ImageFolderSource(folder, content)


def _open_shards(pattern: str, columns: tuple) -> Source:
    from webdataset.shardlists import expand_urls

    files = [Path(name).expanduser() for name in expand_urls(pattern)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CSDiffError(
            f"{missing[0]}: expected a tar file ({pattern}), found none; shards are read from local files."
        )
    return _web_dataset(files, columns)


def _web_dataset(files: list[Path], columns: tuple) -> Source:
    from csdiff.data.web_dataset import WebDatasetSource

    return WebDatasetSource(files, *columns)


def _open_saved(path: Path, split: str, columns: tuple) -> Source:
    from datasets import DatasetDict, load_from_disk

    from csdiff.data.hugging_face import HuggingFaceSource

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise CSDiffError(f"{path}: expected the split {split!r}, found {', '.join(dataset)}; choose one of them.")
        dataset = dataset[split]
    return HuggingFaceSource(dataset, f"{path.name}/{split}", *columns)


def _open_hub(name: str, subset: str | None, split: str, columns: tuple) -> Source:
    from datasets import load_dataset

    from csdiff.data.hugging_face import HuggingFaceSource

    try:
        dataset = load_dataset(name, subset, split=split)
    except Exception as error:  # Network, hub, cache and format errors have no common kind.
        reason = " ".join(str(error).split())[:200]
        raise CSDiffError(
            f"{name}: expected a path, or a data set on the hub with the split {split!r}, found neither ({reason})."
        ) from error
    return HuggingFaceSource(dataset, "/".join(filter(None, (name, subset, split))), *columns)
