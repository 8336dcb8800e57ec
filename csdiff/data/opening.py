"""Telling what kind of source a path or id is, and opening it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pyarrow as pa

from csdiff.data.folder import table_source, uncaptioned_folder, urban
from csdiff.data.images import is_image_name
from csdiff.data.items import Source, SourceOptions
from csdiff.data.listing import by_ending, data_files, no_split, split_folders, suffix_of, visible_files
from csdiff.data.tables import TABLE_SUFFIXES, HuggingFaceSource, ParquetSource, find_columns, parquet_footer
from csdiff.data.web_dataset import WebDatasetSource
from csdiff.errors import CSDiffError
from csdiff.kinds import described, kind_of

# A table of captions that lies in a folder of images has one of these names.
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
_TARS = (".tar", ".tar.gz", ".tgz")


def open_source(source: str | Path, *, captions_file: str | Path | None = None, **options) -> Source:
    """Open captions and images in any of the forms that people keep them in; iterate over it for the items.

    Args:
        source: A folder, a file, a pattern of tar files or an id on the hub: the forms are those of docs/store.md.
        captions_file: Table for a folder of images, when it is not in the folder.
        **options: Any of `SourceOptions`.

    Raises:
        CSDiffError: Nothing there, no such split or column, or nothing that is known.
    """
    options = SourceOptions(**options)
    opened = _open(source, captions_file, options)
    opened.splits = options.splits
    return opened


def _open(source: str | Path, captions_file: str | Path | None, options: SourceOptions) -> Source:
    path = Path(source).expanduser().absolute()
    if captions_file is not None:
        if not path.is_dir():
            raise CSDiffError(f"{source}: expected a folder of images for captions_file, found none.")
        return table_source(path, [Path(captions_file).expanduser().absolute()], options, images=True)
    if path.is_dir():
        return _open_folder(path, options)
    if path.is_file():
        if path.name.lower().endswith(_TARS):
            return WebDatasetSource([path], options)
        if suffix_of(path.name) == ".parquet" and _holds_images(path, options):
            return ParquetSource([path], options)
        if is_image_name(path.name):
            raise CSDiffError(f"{source}: expected a folder or a table, found one image; name its folder.")
        return table_source(path.parent, [path.name], options)
    if str(source).endswith(".tar"):
        return _open_shards(str(source), options)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)) and not path.suffix:
        return _open_hub(str(source), options)
    raise CSDiffError(
        f"{source}: expected a folder, a file or the id of a data set on the hub, found nothing; check the path."
    )


def _open_folder(path: Path, options: SourceOptions) -> Source:
    if kind_of(path) is not None:
        raise CSDiffError(f"{path}: expected images or captions, but it {described(path)}.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, options)
    if (path / "image").is_dir() and (path / "caption").is_dir():
        return urban(path)
    names = visible_files(path)
    images = [name for name in names if is_image_name(name)]
    tables = [name for name in names if _is_table(path, name)]
    for name in TABLE_NAMES:
        if name in tables:
            return table_source(path, [name], options, names)
    names = split_folders(path, images + tables, names, options)
    if tables := sorted(set(tables) & set(names)):
        return table_source(path, tables, options, names)
    tars = [name for name in names if name.lower().endswith(_TARS)]
    # A stray archive among images is one of their folder's other files; shards are numbered.
    if tars and (len(tars) > len(images) or any(re.search(r"\d{3}", PurePosixPath(name).name) for name in tars)):
        return _listed(WebDatasetSource(_files(path, tars, options), options), names, tars)
    parquets = [n for n in names if suffix_of(n) == ".parquet" and _holds_images(path / n, options, bool(images))]
    if parquets:
        return _listed(ParquetSource(_files(path, parquets, options), options), names, parquets)
    others = [name for name in names if suffix_of(name) in TABLE_SUFFIXES]
    if not images and others:
        tables = [file.relative_to(path).as_posix() for file in _files(path, others, options)]
        if len(set(map(suffix_of, tables))) > 1:
            raise CSDiffError(f"{path}: expected images, or tables of one kind (name one), but it {described(path)}.")
        return table_source(path, tables, options)
    if options.metadata_columns:
        raise CSDiffError(f"{path}: metadata_columns need a table ({', '.join(TABLE_NAMES)}), found none.")
    return uncaptioned_folder(path, names)


def _files(path: Path, names: list[str], options: SourceOptions) -> list[Path]:
    return [path / name for name in data_files(path, names, options)]


def _listed(source: Source, names: list[str], read: list[str]) -> Source:
    """A source that says which files of its folder it does not read."""
    # img2dataset's account of a shard belongs to it.
    known = {*read, *(name[:-4] + ending for name in read for ending in (".parquet", "_stats.json"))}
    source.not_read = by_ending(name for name in names if name not in known)
    return source


def _is_table(path: Path, name: str) -> bool:
    base = PurePosixPath(name).name.lower()
    # An object is somebody's description of a data set.
    described = base == "metadata.json" and (path / name).read_bytes().lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")
    return base in TABLE_NAMES and not described


def _holds_images(file: Path, options: SourceOptions, among_images: bool = False) -> bool:
    """Whether a parquet file has a column of encoded images, rather than of their names."""
    try:
        schema = parquet_footer(file).schema.to_arrow_schema()
    except CSDiffError:
        if among_images:  # Nobody asks for it.
            return False
        raise
    name, _ = find_columns(schema.names, SourceOptions(image_column=options.image_column), file)
    kind = pa.null() if name is None else schema.field(name).type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _open_shards(pattern: str, options: SourceOptions) -> Source:
    from webdataset.shardlists import expand_urls

    files = [Path(name).expanduser().absolute() for name in expand_urls(pattern)]
    if missing := [file for file in files if not file.is_file()]:
        raise CSDiffError(f"{missing[0]}: expected a tar file ({pattern}), found none on this machine.")
    return WebDatasetSource(files, options)


def _open_saved(path: Path, options: SourceOptions) -> Source:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        options.splits.update(dataset)
        dataset = dataset[options.split] if options.split in dataset else no_split(path, options.split, dataset)
    return HuggingFaceSource(dataset, f"{path.name}/{options.split}", options, [path])


def _open_hub(name: str, options: SourceOptions) -> Source:
    from datasets import config, load_dataset
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        dataset = load_dataset(name, options.subset, split=options.split)
    except Exception as error:  # Network, hub, cache and format errors have no common kind.
        expected = f"expected a path, or a data set on the hub with the split {options.split!r}"
        raise CSDiffError(f"{name}: {expected}, found neither ({' '.join(str(error).split())[:200]}).") from error
    options.splits.add(options.split)
    # Files of a data set of the hub lie in its caches, and nowhere else.
    folders = [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    label = "/".join(filter(None, (name, options.subset, options.split)))
    return HuggingFaceSource(dataset, label, options, folders)
