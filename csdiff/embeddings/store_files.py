"""The files of a store: found, checked that they are whole and fit together, and read as long columns."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.layout import ARRAY_FOLDERS, FINGERPRINT_FILE, METADATA_FOLDER, find_shards
from csdiff.errors import CSDiffError
from csdiff.files import check_types, read_json

# Dimensions of a column's array, rows included.
DIMENSIONS = {"text_embeds": 2, "image_embeds": 2, "text_states": 3, "text_mask": 2, "image_tokens": 3}

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


def open_shards(
    path: Path, fingerprint: dict, files: dict[str, dict]
) -> tuple[dict[str, list[Shard]], ShardedMetadata | None]:
    """Shards of every column in order, and the metadata if there is some; all must have the same rows.

    `fingerprint` and `files`, those that belong to the store, are empty for a foreign folder, where all files do.
    """

    def own(folder: str, stem: str, suffix: str) -> dict[int, Path]:
        shards = find_shards(path / folder, stem, suffix)
        return {n: file for n, file in shards.items() if not files or file.relative_to(path).as_posix() in files}

    bfloat16 = fingerprint.get("dtype") == "bfloat16"
    found = {key: own(folder, stem, "npy") for key, (folder, stem) in ARRAY_FOLDERS.items()}
    shards = {key: {n: Shard(f, key, bfloat16) for n, f in part.items()} for key, part in found.items() if part}
    if not {"text_embeds", "image_embeds"} & shards.keys():
        raise CSDiffError(
            f"{path}: expected text_emb/text_emb_0.npy or img_emb/img_emb_0.npy (the clip-retrieval layout), found "
            "neither; make a store with `csdiff embed`."
        )
    counts = {ARRAY_FOLDERS[key][0]: {n: len(shard) for n, shard in part.items()} for key, part in shards.items()}
    parquets = own(METADATA_FOLDER, "metadata", "parquet")
    metadata = ShardedMetadata(list(parquets.values())) if parquets else None
    if metadata:
        counts[METADATA_FOLDER] = dict(zip(parquets, metadata.lengths, strict=True))
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
    return {key: list(part.values()) for key, part in shards.items()}, metadata


class Shard:
    """One npy file; never unpickles. It is checked when the shard is made, and mapped on first use.

    npy has no bfloat16: such a shard holds its bits as uint16.
    """

    def __init__(self, path: Path, key: str, bfloat16: bool = False):
        self.path = path
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CSDiffError(f"{path} is not a whole npy file ({error}); restore it or write it again.") from error
        allowed = ("bool",) if key == "text_mask" else ("uint16",) if bfloat16 else ("float16", "float32", "float64")
        fits = array.dtype.name in allowed and array.dtype.isnative and array.ndim == DIMENSIONS[key]
        if not fits or not array.flags.c_contiguous or array.offset % array.itemsize:
            order = "C" if array.flags.c_contiguous else "Fortran"
            raise CSDiffError(
                f"{path}: expected {' / '.join(allowed)} in {DIMENSIONS[key]} dimensions, in C order, found "
                f"{array.dtype} {array.shape} in {order} order; save it again in that form."
            )
        # A longer file than the header says is as wrong as a truncated one, which numpy refuses.
        size, found = array.offset + array.nbytes, path.stat().st_size
        if found != size:
            raise CSDiffError(f"{path} is damaged: expected {size:,} bytes, found {found:,}; restore it.")
        self.shape, self.offset = array.shape, array.offset
        self.dtype = torch.bfloat16 if array.dtype == np.uint16 else torch.from_numpy(np.empty(0, array.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def tensor(self) -> Tensor:
        """The whole shard as a tensor over a memory map; nothing is read yet."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        # Unlike numpy's maps it keeps no file open: a store may have more shards than a process may have open files.
        start = self.offset // self.dtype.itemsize
        mapped = torch.from_file(str(self.path), size=start + int(np.prod(self.shape)), dtype=self.dtype)
        return mapped[start:].view(self.shape)


class Column:
    """Several shards as one array (N, ...) with random access, given as float32, or bool for masks."""

    def __init__(self, shards: list[Shard]):
        first = shards[0]
        for shard in shards[1:]:
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise CSDiffError(
                    f"{shard.path}: expected rows of {first.shape[1:]} {first.dtype} as in {first.path.name}, found "
                    f"{shard.shape[1:]} {shard.dtype}; shards of a folder must come from one encoder."
                )
        self.shards, self.dtype, self.row_shape = shards, first.dtype, tuple(first.shape[1:])
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])

    def gather(self, rows: np.ndarray) -> Tensor:
        """These rows (int64, in range), in that order; refused if one is not finite."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        gathered = torch.empty((len(rows), *self.row_shape), dtype=self.dtype)
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(places):
                shard = shards[places[0]]
                local = torch.from_numpy(rows[places] - self.starts[shard])
                found = self.shards[shard].tensor.index_select(0, local)
                gathered.index_copy_(0, torch.from_numpy(places), found)
        if gathered.dtype == torch.bool:
            return gathered
        values = gathered.float()
        # One sum instead of a look at every value: NaN and infinity reach it.
        if not torch.isfinite(values.sum()):
            wrong = (~values.flatten(1).isfinite().all(1)).nonzero()
            if len(wrong):
                folder, place = self.shards[0].path.parent.parent, self.place(int(rows[int(wrong[0])]))
                raise CSDiffError(
                    f"{folder}: {place} is not finite (NaN or infinity, as half precision gives on overflow; "
                    f"{len(wrong)} of {len(values)} rows read): embed these again, or leave them out."
                )
        return values

    def place(self, row: int) -> str:
        """Where a row is on the disk: "row 3 of img_emb/img_emb_0.npy"."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file = self.shards[number].path
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
