"""The files of a store: found, checked that they are whole and fit together, and read as long columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from csdiff.embeddings.fingerprint import file_sha256
from csdiff.errors import CSDiffError
from csdiff.files import check_types, read_json

FINGERPRINT_FILE = "csdiff.json"
REPORT_FILE = "report.json"
# Work in progress of `csdiff embed`; its presence without a csdiff.json means that the store is not complete.
PARTIAL_FOLDER = ".partial"
METADATA = "metadata"
# Key of `EmbeddingStore.read` -> name of the folder and its files, and dimensions of the arrays, rows included. The
# first two, and the metadata, are clip-retrieval's own.
COLUMNS = {
    "text_embeds": ("text_emb", 2),
    "image_embeds": ("img_emb", 2),
    "text_states": ("text_states", 3),
    "text_mask": ("text_mask", 2),
    "image_tokens": ("image_tokens", 3),
}

_FLOATS = ("float16", "float32", "float64")

# What stands in a store's `csdiff.json`, for whoever reads it afterwards.
_TYPES = {
    **dict.fromkeys(("text_encoder", "image_encoder", "tokenizer", "preprocessing", "data"), dict),
    **dict.fromkeys(("versions", "files", "statistics", "text_statistics"), dict),
    "rows": int,
    "dtype": str,
    "normalized": bool,
}


def read_fingerprint(path: Path) -> dict | None:
    """Content of a store's `csdiff.json`, its types checked; None without one."""
    file = path / FINGERPRINT_FILE
    if not file.exists():
        return None
    found = read_json(file)
    if found.get("kind") != "store":
        raise CSDiffError(
            f'{file}: expected "kind": "store", found {found.get("kind")!r}; give the folder of an embedding store.'
        )
    cure = "restore the file, or remove it to read the folder as foreign"
    check_types(file, found, _TYPES, cure)
    for name, entry in (found.get("files") or {}).items():
        stated = entry if isinstance(entry, dict) else {}
        if type(stated.get("bytes")) is not int or type(stated.get("sha256")) is not str:
            raise CSDiffError(f"{file}: {name}: expected bytes and sha256, found {entry!r:.60}; {cure}.")
    return found


def check_files(path: Path, files: dict[str, dict], checksums: bool) -> None:
    """Refuse a store of which a file is missing, or differs in size (or in its checksum) from what is stated."""
    for name, stated in files.items():
        file, cure = path / name, "restore it, or delete the store and embed again"
        if not file.is_file():
            raise CSDiffError(f"{file} is missing (sha256 expected {stated['sha256']}, found no file); {cure}.")
        size = file.stat().st_size
        if checksums or size != stated["bytes"]:
            digest = file_sha256(file)
            if digest != stated["sha256"]:
                expected = f"{stated['bytes']:,} bytes with sha256 {stated['sha256']}"
                raise CSDiffError(f"{file} is damaged: expected {expected}, found {size:,} with {digest}; {cure}.")


def open_columns(path: Path, fingerprint: dict) -> tuple[dict[str, Column], ShardedMetadata | None]:
    """The columns, and the metadata if there is some; all must have the same rows in every shard.

    Where the fingerprint lists files, no others belong to the store; without one (an empty dict) all of them do.
    """
    listed, bfloat16 = fingerprint.get("files"), fingerprint.get("dtype") == "bfloat16"

    def shards(name: str, suffix: str) -> dict[int, Path]:
        found = {}
        for file in (path / name).glob(f"{name}_*.{suffix}"):
            number = file.stem.removeprefix(f"{name}_")
            if number.isdecimal() and (not listed or f"{name}/{file.name}" in listed):
                found[int(number)] = file
        return dict(sorted(found.items()))

    columns, counts, metadata = {}, {}, None
    for key, (name, dimensions) in COLUMNS.items():
        if files := shards(name, "npy"):
            allowed = ("bool",) if key == "text_mask" else ("uint16",) if bfloat16 else _FLOATS
            columns[key] = Column(list(files.values()), dimensions, allowed)
            counts[name] = dict(zip(files, columns[key].lengths, strict=True))
    if not {"text_embeds", "image_embeds"} & columns.keys():
        raise CSDiffError(
            f"{path}: expected text_emb/text_emb_0.npy or img_emb/img_emb_0.npy (the clip-retrieval layout), found "
            "neither; make a store with `csdiff embed`."
        )
    if files := shards(METADATA, "parquet"):
        metadata = ShardedMetadata(list(files.values()))
        counts[METADATA] = dict(zip(files, metadata.lengths, strict=True))
    first, expected = next(iter(counts.items()))
    for folder, count in counts.items():
        for number in sorted(expected.keys() | count.keys()):
            if expected.get(number) != count.get(number):
                rows = [f"{c[number]} rows" if number in c else "no file" for c in (expected, count)]
                raise CSDiffError(
                    f"{path}: shard {number} has {rows[0]} in {first} and {rows[1]} in {folder}, which must belong "
                    "together; write the shard again."
                )
    rows = sum(expected.values())
    if rows == 0 or rows != fingerprint.get("rows", rows):
        stated = fingerprint.get("rows", "at least one")
        raise CSDiffError(f"{path}: expected {stated} rows, found {rows}; embed again.")
    return columns, metadata


def open_shard(path: Path, dimensions: int, allowed: tuple[str, ...]) -> Tensor:
    """One npy file of some dtype, checked and as a tensor over a memory map; never unpickles."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise CSDiffError(f"{path} is not a whole npy file ({error}); restore it or write it again.") from error
    fits = array.dtype.name in allowed and array.dtype.isnative and array.ndim == dimensions
    if not fits or not array.flags.c_contiguous or array.offset % array.itemsize:
        order = "C" if array.flags.c_contiguous else "Fortran"
        raise CSDiffError(
            f"{path}: expected {' / '.join(allowed)} in {dimensions} dimensions, in C order, found "
            f"{array.dtype} {array.shape} in {order} order; save it again in that form."
        )
    # A longer file than the header says is as wrong as a truncated one, which numpy refuses.
    size, found = array.offset + array.nbytes, path.stat().st_size
    if found != size:
        raise CSDiffError(f"{path} is damaged: expected {size:,} bytes, found {found:,}; restore it.")
    # npy has no bfloat16: such a shard holds its bits as uint16.
    bfloat16 = array.dtype == np.uint16
    dtype = torch.bfloat16 if bfloat16 else torch.from_numpy(np.empty(0, array.dtype)).dtype
    if 0 in array.shape:
        return torch.empty(array.shape, dtype=dtype)
    # Unlike numpy's maps it keeps no file open: a store may have more shards than a process may have open files.
    start = array.offset // array.itemsize
    return torch.from_file(str(path), size=start + array.size, dtype=dtype)[start:].view(array.shape)


class Column:
    """Several shards as one array (N, ...) with random access, given as float32, or bool for masks."""

    def __init__(self, files: list[Path], dimensions: int, allowed: tuple[str, ...]):
        self.files, self.shards = files, [open_shard(file, dimensions, allowed) for file in files]
        first = self.shards[0]
        for file, shard in zip(files, self.shards, strict=True):
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise CSDiffError(
                    f"{file}: expected rows of {tuple(first.shape[1:])} {first.dtype} as in {files[0].name}, found "
                    f"{tuple(shard.shape[1:])} {shard.dtype}; shards of a folder must come from one encoder."
                )
        self.row_shape, self.lengths = tuple(first.shape[1:]), [len(shard) for shard in self.shards]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def gather(self, rows: np.ndarray) -> Tensor:
        """These rows (int64, in range), in that order; refused if one is not finite."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        gathered = torch.empty((len(rows), *self.row_shape), dtype=self.shards[0].dtype)
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(places):
                shard = shards[places[0]]
                local = torch.from_numpy(rows[places] - self.starts[shard])
                found = self.shards[shard].index_select(0, local)
                gathered.index_copy_(0, torch.from_numpy(places), found)
        if gathered.dtype == torch.bool:
            return gathered
        values = gathered.float()
        # One sum instead of a look at every value: NaN and infinity reach it.
        if not torch.isfinite(values.sum()):
            wrong = (~values.flatten(1).isfinite().all(1)).nonzero()
            if len(wrong):
                folder, place = self.files[0].parent.parent, self.place(int(rows[int(wrong[0])]))
                raise CSDiffError(
                    f"{folder}: {place} is not finite (NaN or infinity, as half precision gives on overflow; "
                    f"{len(wrong)} of {len(values)} rows read): embed these again, or leave them out."
                )
        return values

    def place(self, row: int) -> str:
        """Where a row is on the disk: "row 3 of img_emb/img_emb_0.npy"."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file = self.files[number]
        return f"row {row - int(self.starts[number])} of {file.parent.name}/{file.name}"


class ShardedMetadata:
    """Columns of `metadata/metadata_{k}.parquet`, each loaded whole on first use; `names` are in every file."""

    def __init__(self, files: list[Path]):
        self.files, self.lengths, names = files, [], []
        for file in files:
            try:
                with pq.ParquetFile(file) as opened:
                    self.lengths.append(opened.metadata.num_rows)
                    names.append(opened.schema_arrow.names)
            except (OSError, pa.ArrowException) as error:
                raise CSDiffError(
                    f"{file} is not a readable parquet file ({error}); restore it or write it again."
                ) from error
        self.names = [name for name in names[0] if all(name in others for others in names)]
        self._columns: dict[str, pa.ChunkedArray] = {}

    def take(self, name: str, rows: np.ndarray) -> list:
        """Values of one column at these rows."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name].take(pa.array(rows)).to_pylist()

    def codes(self, name: str) -> np.ndarray:
        """A number (int64) for each row, equal where the values of a column are equal; keeps no column in memory."""
        encoded = self._read(name).dictionary_encode("encode").combine_chunks()
        return encoded.indices.to_numpy().astype(np.int64)

    def _read(self, name: str) -> pa.ChunkedArray:
        parts = [pq.read_table(file, columns=[name], memory_map=True).column(0) for file in self.files]
        kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
        kind = kinds.pop() if len(kinds) == 1 else pa.large_string()
        # Parts by several tools differ (string, large_string, dictionary, numbers): as text they are one column. Its
        # offsets are 64 bits wide, as ten million captions have more than 2 GB.
        if pa.types.is_string(kind) or pa.types.is_dictionary(kind):
            kind = pa.large_string()
        try:
            return pa.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise CSDiffError(
                f"{self.files[0].parent}: the parts of the column {name!r} cannot be read as one column of text "
                f"({error}); write these files again."
            ) from error
