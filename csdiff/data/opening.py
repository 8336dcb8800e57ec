"""Telling what kind of source a path or id is, and opening it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from csdiff.data.benchmark_sets import benchmark_table, image_folder
from csdiff.data.folder import CaptionSource, ImageFolderSource, uncaptioned_folder
from csdiff.data.images import is_image_name
from csdiff.data.items import printable
from csdiff.data.parquet import ParquetSource, parquet_footer
from csdiff.data.sources import Source
from csdiff.data.splits import data_files, split_folders
from csdiff.data.tables import IMAGE_COLUMNS, TABLE_SUFFIXES, find_column, joined, read_table
from csdiff.data.text_files import UnreadableText, read_text
from csdiff.data.walk import by_ending, visible_files
from csdiff.data.web_dataset import WebDatasetSource
from csdiff.errors import CSDiffError

# A table of captions that lies in a folder of images has one of these names.
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class _Wanted:
    split: str
    subset: str | None
    columns: tuple
    allow_outside: bool


def open_source(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    captions_file: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    allow_outside: bool = False,
) -> Source:
    """Open captions and images in any of the forms that people keep them in.

    Args:
        source: One of

            - a folder of images, captioned by `metadata.jsonl` / `.csv` / `.parquet` / `.json` in it or in its
              folders, by `captions_file`, by files beside them, or not at all; `train/`, ... are splits;
            - a table (`.jsonl`, `.csv`, `.tsv`, `.json`, `.parquet`) of captions and image
              files, relative to its folder; also `.txt` whose first line names its columns;
            - a table or `.txt` file of captions alone;
            - a parquet file with the images inside, or a folder of them or of tables, as the hub lays them out;
            - webdataset shards: a `.tar` file, a folder of them, or a pattern such as `data/{00000..00099}.tar`;
            - a folder written by `datasets.Dataset.save_to_disk`, or the id of a data set on the hub;
            - COCO captions, Flickr30k, Urban-1k or DOCCI as they are published, see `csdiff.data.benchmark_sets`.
        split: Of a data set that has several; "all" for all files of a folder.
        subset: Configuration of a data set of the hub.
        captions_file: Table for a folder of images, when it is not in the folder.
        image_column: Column of the images or of their file names; the usual names are tried by default.
        caption_column: Column of the captions; the usual names are tried by default.
        metadata_columns: Further columns to keep, as text.
        allow_outside: Read images that a table names outside the source's folder (`../x.png`, `/data/x.png`).

    Raises:
        CSDiffError: Nothing there, no such split or column, or nothing that is known.
    """
    wanted = _Wanted(split, subset, (image_column, caption_column, list(metadata_columns)), allow_outside)
    path = Path(source).expanduser().absolute()
    if captions_file is not None:
        if not path.is_dir():
            raise CSDiffError(f"{source}: expected a folder of images for captions_file, found none.")
        if Path(captions_file).is_file() and (found := _benchmark(Path(captions_file), wanted, path)):
            return found
        return _with_table(path, [Path(captions_file).expanduser().absolute()], wanted, images=True)
    if path.exists() and (found := _benchmark(path, wanted)):
        return found
    if path.is_dir():
        return _open_folder(path, wanted)
    if path.is_file():
        return _open_file(path, wanted)
    if str(source).endswith(".tar"):
        return _open_shards(str(source), wanted)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)) and not path.suffix:
        return _open_hub(str(source), wanted)
    raise CSDiffError(
        f"{source}: expected a folder, a file or the id of a data set on the hub, found nothing; check the path."
    )


def _benchmark(path: Path, wanted: _Wanted, images: Path | None = None) -> Source | None:
    """A published data set, unless columns are named: those are of a table."""
    found = None if any(wanted.columns) else benchmark_table(path, wanted.split, images)
    return None if found is None else ImageFolderSource(*found)


def _open_folder(path: Path, wanted: _Wanted) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, wanted)
    names = visible_files(path)
    images = [name for name in names if is_image_name(name)]
    tables = [name for name in names if _is_table(path, name)]
    root = [name for name in TABLE_NAMES if name in tables]
    if root:
        return _with_table(path, root[:1], wanted, names)
    try:
        names = split_folders(images + tables, names, wanted.split)
    except CSDiffError as error:
        raise CSDiffError(f"{path}: {error}") from None
    if tables := [name for name in tables if name in set(names)]:
        return _with_table(path, tables, wanted, names)
    tars = [name for name in names if name.lower().endswith(_TARS)]
    # A stray archive among images is one of their folder's other files; shards are numbered.
    if tars and (len(tars) > len(images) or any(re.search(r"\d{3}", PurePosixPath(name).name) for name in tars)):
        source = WebDatasetSource(_files(path, tars, wanted), *wanted.columns)
        return _listed(source, names, tars)
    parquets = [n for n in names if n.lower().endswith(".parquet") and _holds_images(path / n, wanted, bool(images))]
    if parquets:
        source = ParquetSource(_files(path, parquets, wanted), *wanted.columns, wanted.allow_outside)
        return _listed(source, names, parquets)
    others = [name for name in names if PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES]
    if not images and others:
        tables = [file.relative_to(path).as_posix() for file in _files(path, others, wanted)]
        if len({PurePosixPath(name).suffix for name in tables}) > 1:
            raise CSDiffError(
                f"{path}: expected images, or tables of one kind, found {', '.join(tables[:5])}; give one."
            )
        return _with_table(path, tables, wanted)
    if wanted.columns[2]:
        raise CSDiffError(f"{path}: metadata_columns need a table ({', '.join(TABLE_NAMES)}), found none.")
    return uncaptioned_folder(path, names)


def _files(path: Path, names: list[str], wanted: _Wanted) -> list[Path]:
    return [path / name for name in data_files(path, names, wanted.split, wanted.subset)]


def _listed(source: Source, names: list[str], read: list[str]) -> Source:
    """A source that says which files of its folder it does not read."""
    # img2dataset's account of a shard belongs to it.
    beside = {name[:-4] + ending for name in read for ending in (".parquet", "_stats.json")}
    source.not_read = by_ending(printable(name) for name in names if name not in {*read, *beside})
    return source


def _is_table(path: Path, name: str) -> bool:
    base = PurePosixPath(name).name.lower()
    if base == "metadata.json":
        # An object is somebody's description of a data set.
        try:
            return read_text(path / name).lstrip().startswith("[")
        except UnreadableText:
            return False
    return base in TABLE_NAMES


def _open_file(path: Path, wanted: _Wanted) -> Source:
    if path.name.lower().endswith(_TARS):
        return WebDatasetSource([path], *wanted.columns)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise CSDiffError(
            f"{path}: expected a table ({', '.join(TABLE_SUFFIXES)}) or a .tar file, found {path.suffix!r}."
        )
    if path.suffix.lower() == ".parquet" and _holds_images(path, wanted):
        return ParquetSource([path], *wanted.columns, wanted.allow_outside)
    return _with_table(path.parent, [path.name], wanted)


def _holds_images(file: Path, wanted: _Wanted, among_images: bool = False) -> bool:
    """Whether a parquet file has a column of encoded images, rather than of their names."""
    try:
        schema = parquet_footer(file).schema.to_arrow_schema()
    except CSDiffError:
        if among_images:  # It is read for nothing.
            return False
        raise
    name = find_column(schema.names, wanted.columns[0], IMAGE_COLUMNS, file, "image_column")
    kind = pa.null() if name is None else schema.field(name).type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _with_table(
    folder: Path, tables: Sequence[str | Path], wanted: _Wanted, names: Sequence[str] = (), images: bool = False
) -> Source:
    """Captions of tables, with the images that they name relative to themselves.

    Args:
        folder: Of the images.
        tables: Relative to the folder; the file names in one elsewhere are relative to the folder.
        wanted: Options.
        names: Of the files in the folder, where they are known.
        images: The captions are of images.
    """
    first = folder / tables[0]
    content = joined([(_parent(str(name)), read_table(folder / name, *wanted.columns)) for name in tables])
    if not content.captions:
        raise CSDiffError(f"{first}: expected at least one row, found none.")
    if content.files is None:
        # Captions that cannot be matched would drop the images without a word.
        if images or any(map(is_image_name, names)):
            raise CSDiffError(
                f"{first}: expected a column that names the image of each caption ({', '.join(IMAGE_COLUMNS[:2])}, "
                "...), found captions alone, which cannot be matched to the images; add the column, or name it with "
                "image_column."
            )
        return CaptionSource(content)
    if not names and not images and not any((folder / name).exists() for name in content.files[:20]):
        folder = image_folder(first, content.files) or folder
    rest = [name for name in names if name not in {*content.files, *tables}]
    return ImageFolderSource(folder, content, rest, wanted.allow_outside)


def _parent(name: str) -> str:
    return "" if Path(name).is_absolute() else name[: -len(PurePosixPath(name).name)]


def _open_shards(pattern: str, wanted: _Wanted) -> Source:
    from webdataset.shardlists import expand_urls

    files = [Path(name).expanduser().absolute() for name in expand_urls(pattern)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CSDiffError(
            f"{missing[0]}: expected a tar file ({pattern}), found none; shards are read from local files."
        )
    return WebDatasetSource(files, *wanted.columns)


def _open_saved(path: Path, wanted: _Wanted) -> Source:
    from datasets import DatasetDict, load_from_disk

    from csdiff.data.hugging_face import HuggingFaceSource

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if wanted.split not in dataset:
            raise CSDiffError(
                f"{path}: expected the split {wanted.split!r}, found {', '.join(dataset)}; choose one of them."
            )
        dataset = dataset[wanted.split]
    return HuggingFaceSource(dataset, f"{path.name}/{wanted.split}", *wanted.columns, [path], wanted.allow_outside)


def _open_hub(name: str, wanted: _Wanted) -> Source:
    from datasets import config, load_dataset
    from huggingface_hub.constants import HF_HUB_CACHE

    from csdiff.data.hugging_face import HuggingFaceSource

    try:
        dataset = load_dataset(name, wanted.subset, split=wanted.split)
    except Exception as error:  # Network, hub, cache and format errors have no common kind.
        reason = " ".join(str(error).split())[:200]
        raise CSDiffError(
            f"{name}: expected a path, or a data set on the hub with the split {wanted.split!r}, found neither "
            f"({reason})."
        ) from error
    # Files of a data set of the hub lie in its caches, and nowhere else.
    folders = [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    label = "/".join(filter(None, (name, wanted.subset, wanted.split)))
    return HuggingFaceSource(dataset, label, *wanted.columns, folders, wanted.allow_outside)
