"""Checks that a store on disk is whole: fingerprint, sizes, row counts and checksums."""

from __future__ import annotations

from pathlib import Path
from types import NoneType

from csdiff.embeddings.arrays import Shard
from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.layout import ARRAY_FOLDERS, FINGERPRINT_FILE, METADATA_FOLDER, find_shards
from csdiff.embeddings.metadata import ShardedMetadata
from csdiff.embeddings.statistics import EmbeddingStatistics
from csdiff.errors import CSDiffError
from csdiff.files import read_json

JSON_NAMES = {int: "a number", str: "text", bool: "true or false", dict: "an object", NoneType: "null"}


# What stands in a store's `csdiff.json`, for whoever reads it afterwards.
FIELDS: dict[str, tuple[type, ...]] = {
    "rows": (int,),
    "dtype": (str,),
    "normalized": (bool, NoneType),
    "files": (dict, NoneType),
    **dict.fromkeys(("text_encoder", "image_encoder", "tokenizer", "preprocessing"), (dict, NoneType)),
    **dict.fromkeys(("statistics", "text_statistics", "data", "versions"), (dict, NoneType)),
}


def read_fingerprint(path: Path) -> dict | None:
    """Content of a store's `csdiff.json`; None without one.

    Raises:
        CSDiffError: Not JSON, not that of a store, or a part of it is of the wrong type.
    """
    file = path / FINGERPRINT_FILE
    if not file.exists():
        return None
    fingerprint = read_json(file)
    if fingerprint.get("kind") != "store":
        raise CSDiffError(
            f'{file}: expected "kind": "store", found {fingerprint.get("kind")!r}; give the folder of an embedding '
            "store."
        )
    stated = list((fingerprint.get("files") or {}).values()) if isinstance(fingerprint.get("files"), dict) else []
    fields = [(name, fingerprint[name], kinds) for name, kinds in FIELDS.items() if name in fingerprint]
    fields += [("files", entry, (dict,)) for entry in stated]
    fields += [
        (f"files: {key}", entry.get(key), kinds)
        for entry in stated
        if isinstance(entry, dict)
        for key, kinds in (("bytes", (int,)), ("sha256", (str,)))
    ]
    for name, value, kinds in fields:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CSDiffError(
                f"{file}: {name}: expected {' or '.join(JSON_NAMES[kind] for kind in kinds)}, found {value!r:.60}; "
                "restore the file, or remove it to read the folder as foreign."
            )
    for name in ("statistics", "text_statistics"):
        if "mean" in (fingerprint.get(name) or {}):
            EmbeddingStatistics.from_dict(fingerprint[name], f"{file}: {name}")
    return fingerprint


def check_files(path: Path, files: dict[str, dict], checksums: bool) -> None:
    """Compare the files of a store with what its `csdiff.json` states.

    Args:
        path: Folder of the store.
        files: `bytes` and `sha256` of each file, by its name in the folder.
        checksums: Compare the checksums too, not only the sizes.

    Raises:
        CSDiffError: A file is missing or differs; named, with the expected and the found checksum.
    """
    for name, stated in files.items():
        file = path / name
        if not file.is_file():
            raise CSDiffError(
                f"{file} is missing (sha256 expected {stated['sha256']}, found no file); restore it, or delete the "
                "store and embed again."
            )
        if (checksums or file.stat().st_size != stated["bytes"]) and file_sha256(file) != stated["sha256"]:
            raise CSDiffError(
                f"{file} is damaged: expected {stated['bytes']:,} bytes with sha256 {stated['sha256']}, found "
                f"{file.stat().st_size:,} with {file_sha256(file)}; restore it, or delete the store and embed again."
            )


def open_shards(path: Path, fingerprint: dict, files: dict[str, dict]) -> dict[str, list[Shard]]:
    """Shards of every column in order, their sizes and row counts checked.

    Args:
        path: Folder of the store.
        fingerprint: Content of its `csdiff.json`; empty for a foreign folder.
        files: The files that belong to the store; empty for a foreign folder, where all do.

    Raises:
        CSDiffError: No embeddings, a damaged shard, or columns of different lengths.
    """
    bfloat16 = fingerprint.get("dtype") == "bfloat16"
    found: dict[str, dict[int, Shard]] = {}
    for key, (folder, stem) in ARRAY_FOLDERS.items():
        shards = _own(path, find_shards(path / folder, stem, "npy"), files)
        if shards:
            found[key] = {number: Shard(file, key, bfloat16) for number, file in shards.items()}
    if not {"text_embeds", "image_embeds"} & found.keys():
        raise CSDiffError(
            f"{path}: expected text_emb/text_emb_0.npy or img_emb/img_emb_0.npy (the clip-retrieval layout), found "
            "neither; make a store with `csdiff embed`."
        )
    first_key, first = next(iter(found.items()))
    for key, shards in found.items():
        counts = {number: len(shard) for number, shard in shards.items()}
        expected = {number: len(shard) for number, shard in first.items()}
        _compare_counts(path, ARRAY_FOLDERS[first_key][0], expected, ARRAY_FOLDERS[key][0], counts)
    rows = sum(len(shard) for shard in first.values())
    if rows == 0 or rows != fingerprint.get("rows", rows):
        raise CSDiffError(
            f"{path}: expected {fingerprint.get('rows', 'at least one')} rows, found {rows}; embed again."
        )
    return {key: list(shards.values()) for key, shards in found.items()}


def open_metadata(path: Path, shards: list[Shard], files: dict[str, dict]) -> ShardedMetadata | None:
    """Metadata of a store, None when there is none; its row counts are checked against those of the shards.

    Raises:
        CSDiffError: A damaged file, or other row counts than the embeddings have.
    """
    found = _own(path, find_shards(path / METADATA_FOLDER, "metadata", "parquet"), files)
    if not found:
        return None
    metadata = ShardedMetadata(list(found.values()))
    folder = shards[0].path.parent.name
    numbers = [int(shard.path.stem.rpartition("_")[2]) for shard in shards]
    expected = dict(zip(numbers, map(len, shards), strict=True))
    _compare_counts(path, folder, expected, METADATA_FOLDER, dict(zip(found, metadata.lengths, strict=True)))
    return metadata


def _own(path: Path, shards: dict[int, Path], files: dict[str, dict]) -> dict[int, Path]:
    return {number: file for number, file in shards.items() if not files or file.relative_to(path).as_posix() in files}


def _compare_counts(path: Path, first: str, expected: dict[int, int], second: str, found: dict[int, int]) -> None:
    for number in sorted(expected.keys() | found.keys()):
        if expected.get(number) != found.get(number):
            rows = [f"{c[number]} rows" if number in c else "no file" for c in (expected, found)]
            raise CSDiffError(
                f"{path}: shard {number} has {rows[0]} in {first} and {rows[1]} in {second}; row i of both must "
                "belong together, write the shard again."
            )
