"""Opening a store on disk, and the checks that it is whole: fingerprint, sizes, row counts and checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csdiff.embeddings.arrays import Shard
from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.layout import ARRAY_FOLDERS, FINGERPRINT_FILE, METADATA_FOLDER, find_shards
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.options import describe

# What stands in a store's `csdiff.json`, for whoever reads it afterwards.
_FIELDS = {"rows": int, "dtype": str, "normalized": bool | None, "versions": dict | None, "files": dict | None}
_FIELDS |= dict.fromkeys(("text_encoder", "image_encoder", "tokenizer", "preprocessing", "data"), dict | None)
_FIELDS |= dict.fromkeys(("statistics", "text_statistics"), dict | None)


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
    fields = [(name, found[name], kind) for name, kind in _FIELDS.items() if name in found]
    listed = found.get("files")
    for name, entry in listed.items() if isinstance(listed, dict) else ():
        entry = entry if isinstance(entry, dict) else {}
        fields += [(f"{name}: bytes", entry.get("bytes"), int), (f"{name}: sha256", entry.get("sha256"), str)]
    for name, value, kind in fields:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            expected = describe(kind).replace("dict", "an object")
            raise CSDiffError(
                f"{file}: {name}: expected {expected}, found {value!r:.60}; restore the file, or remove it to read "
                "the folder as foreign."
            )
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
