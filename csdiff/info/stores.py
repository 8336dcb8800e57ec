"""What is in an embedding store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.layout import ARRAY_FOLDERS, METADATA_FOLDER, PARTIAL_FOLDER, REPORT_FILE, find_shards
from csdiff.errors import CSDiffError
from csdiff.info.adapters import encoders
from csdiff.info.files import read_json


def describe_store(folder: Path, problems: list[str], check: bool) -> dict:
    """Rows, columns, encoders, statistics and what was left out of a store."""
    known = (folder / "csdiff.json").is_file()
    metadata = read_json(folder / "csdiff.json", problems) if known else {}
    before = len(problems)
    if not known and (folder / PARTIAL_FOLDER).is_dir():
        problems.append(f"{folder} is not finished: the same `csdiff embed` command goes on with it")
    _compare_files(folder, metadata.get("files") or {}, problems, check)
    columns, rows = _columns(folder, metadata, problems)
    report = read_json(folder / REPORT_FILE, []) if known else {}
    facts = {
        "layout": "csdiff" if known else "clip-retrieval, without csdiff.json: encoders and checksums are unknown",
        "rows": rows,
        "text_dim": (columns.get("text_embeds") or {}).get("shape", [None])[-1],
        "image_dim": (columns.get("image_embeds") or {}).get("shape", [None])[-1],
        "columns": columns,
        "captions": _has_captions(folder),
        **encoders(metadata),
        "normalized": metadata.get("normalized"),
        "statistics": _short(metadata.get("statistics")),
        "text_statistics": _short(metadata.get("text_statistics")),
        "left_out": {key: report[key] for key in ("items", "skipped", "truncated_captions") if key in report},
        "versions": metadata.get("versions"),
    }
    if len(problems) == before and (check or not known):
        _open(folder, facts, problems, check)
    return facts


def _compare_files(folder: Path, files: dict, problems: list[str], check: bool) -> None:
    for name, stated in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != stated["bytes"]:
            problems.append(f"{file} has {file.stat().st_size:,} bytes, expected {stated['bytes']:,}")
        elif check and (found := file_sha256(file)) != stated["sha256"]:
            problems.append(f"{file} is damaged: expected sha256 {stated['sha256']}, found {found}")


def _columns(folder: Path, metadata: dict, problems: list[str]) -> tuple[dict, int]:
    """Shards, shape of a row and dtype of every column, from the headers; and the number of rows."""
    columns, rows = {}, {}
    for key, (name, stem) in ARRAY_FOLDERS.items():
        shards = find_shards(folder / name, stem, "npy")
        arrays = [array for file in shards.values() if (array := _header(file, problems)) is not None]
        if not arrays:
            continue
        rows[key] = sum(len(array) for array in arrays)
        dtype = metadata["dtype"] if metadata.get("dtype") == "bfloat16" and key != "text_mask" else arrays[0].dtype
        columns[key] = {"shards": len(shards), "shape": list(arrays[0].shape[1:]), "dtype": str(dtype)}
    if not rows:
        problems.append(f"{folder}: expected text_emb/text_emb_0.npy or img_emb/img_emb_0.npy, found neither")
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{count:,} in {key}" for key, count in rows.items())
        problems.append(f"{folder}: rows do not belong together: {counts}")
    return columns, max(rows.values(), default=0)


def _has_captions(folder: Path) -> bool:
    for file in find_shards(folder / METADATA_FOLDER, "metadata", "parquet").values():
        try:
            return "caption" in pq.read_schema(file).names
        except (OSError, pa.ArrowInvalid):
            return False
    return False


def _header(file: Path, problems: list[str]) -> np.ndarray | None:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        problems.append(f"{file} is not a whole npy file ({error})")
        return None


def _open(folder: Path, facts: dict, problems: list[str], check: bool) -> None:
    """Let the store check itself; of a foreign one, also see what nobody stated."""
    import warnings

    from csdiff.embeddings import EmbeddingStore

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # checksums were compared above
            store = EmbeddingStore.open(folder, verify=False)
    except (CSDiffError, OSError) as error:
        problems.append(str(error))
        return
    facts["normalized"] = store.normalized
    if check:
        for key, side in (("statistics", store.statistics), ("text_statistics", store.text_statistics)):
            facts[key] = facts[key] or (None if side is None else _short(side.to_dict()))
        for key, count in _not_finite(store).items():
            problems.append(f"{folder}: {count:,} rows of {key} hold NaN or infinity")


def _not_finite(store) -> dict[str, int]:
    bad: dict[str, int] = {}
    keys = [key for key in store.keys if key != "text_mask"]
    for block in store.blocks(keys=keys):
        for key, rows in block.items():
            count = int((~rows.flatten(1).isfinite().all(1)).sum())
            if count:
                bad[key] = bad.get(key, 0) + count
    return bad


def _short(statistics: dict | None) -> dict | None:
    """Without the vectors."""
    return statistics and {key: value for key, value in statistics.items() if not isinstance(value, list)}
