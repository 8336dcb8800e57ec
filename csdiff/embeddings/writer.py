"""Writing a store shard by shard, so that it can be killed at any moment and continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from csdiff.embeddings.atomic import fsync, move, write_json
from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.layout import (
    ARRAY_FOLDERS,
    FINGERPRINT_FILE,
    METADATA_FOLDER,
    PARTIAL_FOLDER,
    REPORT_FILE,
    shard_name,
)
from csdiff.embeddings.npy import NpyWriter
from csdiff.embeddings.statistics import UNIT_NORM_TOLERANCE, Moments
from csdiff.errors import CSDiffError

MEASURED = ("text_embeds", "image_embeds")


class StoreWriter:
    """A store in the making.

    A shard goes through two steps, each of which is whole or has not happened: it is *staged* (its rows are decided
    and their images encoded) and *published* (its captions encoded, its files visible in the store). What is not yet
    visible lies in `.partial/`, and `.partial/` goes when `finish` has written `csdiff.json`. Another process may do
    another shard at the same time.

    Args:
        path: Folder of the store.
        shards: Number of shards.
        dtype: "float16", "bfloat16" or "float32".
    """

    def __init__(self, path: str | Path, shards: int, dtype: str = "float16"):
        self.path, self.shards, self.dtype = Path(path), shards, dtype
        self.partial = self.path / PARTIAL_FOLDER
        self._lock_file = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def begin(self, plan: dict) -> bool:
        """Start a store, or go on with one that was started with the same plan.

        Args:
            plan: Everything that decides the content of the store.

        Returns:
            Whether the store is finished already.

        Raises:
            CSDiffError: The folder holds another store, or something else, or another process writes into it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CSDiffError(f"{self.path}: expected a folder for the store, found a file; choose another.")
        finished = _read_json(self.path / FINGERPRINT_FILE)
        if finished is not None:
            self._compare(finished.get("data", {}), plan)
            shutil.rmtree(self.partial, ignore_errors=True)
            return True
        started = _read_json(self.partial / "plan.json")
        if started is not None:
            self._compare(started, plan)
        elif self.path.exists() and any(entry.name != PARTIAL_FOLDER for entry in self.path.iterdir()):
            raise CSDiffError(
                f"{self.path}: expected an empty folder or an unfinished store, found other files; choose another."
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CSDiffError(
                f"{self.path}: the store cannot be written there ({error.strerror}); choose another folder."
            ) from error
        self._lock()
        if started is None:
            write_json(self.partial / "plan.json", plan)
        return False

    def plan(self) -> dict:
        """The plan that the store was started with."""
        return _read_json(self.partial / "plan.json")

    def staged(self, shard: int) -> bool:
        return (self._folder(shard) / "rows.json").exists()

    def published(self, shard: int) -> bool:
        record = self.record(shard)
        return record is not None and not any(
            (self._folder(shard) / name).exists() for name in record["parts"].values()
        )

    def rows(self, shard: int) -> dict:
        """What `stage` was told of a staged shard."""
        return _read_json(self._folder(shard) / "rows.json")

    def captions(self, shard: int) -> list[str]:
        """Captions of a staged shard."""
        return pq.read_table(self._folder(shard) / "metadata.parquet", columns=["caption"]).column(0).to_pylist()

    def record(self, shard: int) -> dict | None:
        """What is known of a shard whose arrays are all written."""
        return _read_json(self._folder(shard) / "shard.json")

    def arrays(self, shard: int, keys: Iterable[str], step: str) -> ShardArrays:
        """Writers of some columns of a shard, for `stage` or `publish`."""
        folder = self._folder(shard)
        if step == "stage":
            folder = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return ShardArrays(folder, list(keys), self.dtype)

    def stage(self, shard: int, arrays: ShardArrays, metadata: pa.Table | None, rows: dict) -> None:
        """First step of a shard: its rows are decided.

        Args:
            shard: Its number.
            arrays: From `arrays(shard, keys, "stage")`, filled.
            metadata: One row each; None for none.
            rows: JSON-able, given back by `rows`.
        """
        moments = arrays.close()
        folder = arrays.folder
        if metadata is not None:
            pq.write_table(metadata, folder / "metadata.parquet")
            fsync(folder / "metadata.parquet")
        write_json(folder / "rows.json", {**rows, "moments": moments, "arrays": arrays.keys})
        move(folder, self._folder(shard))

    def publish(self, shard: int, arrays: ShardArrays, notes: dict | None = None) -> None:
        """Second step of a shard: its remaining columns are written and all of it becomes visible.

        Args:
            shard: Its number.
            arrays: From `arrays(shard, keys, "publish")`, filled; row i belongs to row i of what was staged.
            notes: JSON-able, kept in the shard's record.
        """
        moments = arrays.close()
        rows = self.rows(shard)
        parts = {}
        for key in [*rows["arrays"], *arrays.keys]:
            folder, stem = ARRAY_FOLDERS[key]
            parts[f"{folder}/{shard_name(stem, shard, self.shards, 'npy')}"] = f"{key}.npy"
        if (self._folder(shard) / "metadata.parquet").exists():
            parts[f"{METADATA_FOLDER}/{shard_name('metadata', shard, self.shards, 'parquet')}"] = "metadata.parquet"
        files = {}
        for name, part in parts.items():
            file = self._folder(shard) / part
            files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        record = {"parts": parts, "files": files, "moments": {**rows["moments"], **moments}, "notes": notes or {}}
        write_json(self._folder(shard) / "shard.json", record)
        self.show(shard)

    def show(self, shard: int) -> None:
        """Make the files of a complete shard visible; those that are, stay."""
        for name, part in self.record(shard)["parts"].items():
            source, target = self._folder(shard) / part, self.path / name
            if source.exists():
                target.parent.mkdir(exist_ok=True)
                move(source, target)

    def _moments(self) -> dict[str, Moments]:
        """Moments of the published shards, merged in their order."""
        total: dict[str, Moments] = {}
        for shard in range(self.shards):
            for key, values in self.record(shard)["moments"].items():
                part = Moments.from_dict(values)
                total[key] = total[key].merge(part) if key in total else part
        return total

    def fingerprint(self, plan: dict) -> dict:
        """The parts of a `csdiff.json` that the arrays tell: statistics, and whether the rows have norm 1."""
        statistics = {key: moments.statistics() for key, moments in self._moments().items()}
        side = statistics.get("image_embeds") or statistics.get("text_embeds")
        unit = abs(side.norm_mean - 1) < UNIT_NORM_TOLERANCE and side.norm_std < UNIT_NORM_TOLERANCE
        fingerprint = {
            "format": 1,
            "kind": "store",
            "rows": side.count,
            "dtype": self.dtype,
            "normalized": unit,
            "data": plan,
        }
        for key, name in (("image_embeds", "statistics"), ("text_embeds", "text_statistics")):
            if key in statistics:
                fingerprint[name] = statistics[key].to_dict()
        return fingerprint

    def finish(self, fingerprint: dict, report: dict) -> None:
        """All shards are published: write the report and, as the last thing, the fingerprint."""
        files = {name: file for shard in range(self.shards) for name, file in self.record(shard)["files"].items()}
        write_json(self.path / REPORT_FILE, report, indent=2)
        write_json(self.path / FINGERPRINT_FILE, {**fingerprint, "files": files}, indent=2)
        shutil.rmtree(self.partial)

    def _folder(self, shard: int) -> Path:
        return self.partial / str(shard)

    def _compare(self, there: dict, plan: dict) -> None:
        # Through JSON, so that tuples and lists compare equal.
        there, plan = _flat(there), _flat(json.loads(json.dumps(plan)))
        differences = [
            f"{key} is {there.get(key)!r} there and {plan.get(key)!r} now"
            for key in sorted(there.keys() | plan.keys())
            if there.get(key) != plan.get(key)
        ]
        if differences:
            raise CSDiffError(
                f"{self.path} holds a store made with other options: {'; '.join(differences[:5])}; "
                "choose another output, or delete it first."
            )

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs into one folder are not noticed.
            return
        self._lock_file = (self.partial / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CSDiffError(
                f"{self.path}: another process is writing this store; wait for it, or stop it first."
            ) from None
        except OSError:
            pass  # A file system without locks.


class ShardArrays:
    """The npy files of some columns of one shard, while they are written."""

    def __init__(self, folder: Path, keys: Sequence[str], dtype: str):
        self.folder, self.keys = folder, list(keys)
        self._writers = {
            key: NpyWriter(folder / f"{key}.npy", "bool" if key == "text_mask" else dtype, key in MEASURED)
            for key in keys
        }

    def append(self, columns: dict[str, Tensor]) -> None:
        """Add rows to every column."""
        for key, writer in self._writers.items():
            writer.append(columns[key])

    def close(self) -> dict[str, dict]:
        """Complete the files; returns the moments of the measured columns."""
        moments = {}
        for key, writer in self._writers.items():
            writer.close()
            if writer.moments is not None:
                moments[key] = writer.moments.to_dict()
        return moments


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
