"""Writing a store shard by shard, so that it can be killed at any moment and continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from csdiff.embeddings.fingerprint import file_sha256
from csdiff.embeddings.statistics import UNIT_NORM_TOLERANCE, Moments
from csdiff.embeddings.store_files import COLUMNS, FINGERPRINT_FILE, METADATA, PARTIAL_FOLDER, REPORT_FILE
from csdiff.errors import CSDiffError
from csdiff.files import absolute, flatten, folder_lock, move, read_json, write_json, writing_folder
from csdiff.kinds import described

DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "bool": "|b1"}


class StoreWriter(ExitStack):
    """A store in the making; at the end of its `with` block it gives up the lock that `begin` takes.

    Each shard is written aside into `.partial/`, flushed to the disk and renamed: it is whole or not there. Several
    processes may do one shard each. When all are there, `finish` moves their files into place.

    Args:
        path: Folder of the store.
        shards: Number of shards.
        dtype: "float16", "bfloat16" or "float32".
    """

    def __init__(self, path: str | Path, shards: int, dtype: str = "float16"):
        super().__init__()
        self.path, self.shards, self.dtype, self._plan = absolute(path), shards, dtype, {}
        self.partial = self.path / PARTIAL_FOLDER

    def begin(self, plan: dict) -> bool:
        """Start a store, or go on with one that was started with the same plan; whether it is finished already.

        The plan is everything that decides the content of the store.

        Raises:
            CSDiffError: The folder holds another store, or something else, or another process writes into it.
        """
        self._plan, plan_file = plan, self.partial / "plan.json"
        file = self.path / FINGERPRINT_FILE
        there = read_json(file) if file.exists() else {}
        if there.get("kind") == "store":
            self._compare(there.get("data") or {}, plan)
            shutil.rmtree(self.partial, ignore_errors=True)
            return True
        if plan_file.exists() and not there:
            self._compare(read_json(plan_file), plan)
        elif self.path.is_dir() and any(entry.name != PARTIAL_FOLDER for entry in self.path.iterdir()):
            found = described(self.path)
            raise CSDiffError(f"{self.path}: expected an empty folder or an unfinished store, but it {found}.")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CSDiffError(f"{self.path}: the store cannot be written there ({error.strerror}).") from error
        self.enter_context(folder_lock(self.partial, "this store"))
        if not plan_file.exists():
            write_json(plan_file, plan)
        return False

    def done(self, shard: int) -> bool:
        """Whether a shard is whole, here or where `finish` moves it; one of an earlier csdiff's names is not."""
        folders = self._folder(shard), self.path
        there = folders[0].is_dir()
        return there and all(
            any((folder / name).exists() for folder in folders) for name in self.record(shard)["files"]
        )

    def record(self, shard: int) -> dict:
        """What is known of a whole shard, with what its writer was told to note."""
        return read_json(self._folder(shard) / "shard.json")

    @contextmanager
    def shard(self, number: int, keys: Sequence[str]) -> Iterator[ShardWriter]:
        """Writes the columns of one shard; at the end it is whole, after an error it is not there."""
        with writing_folder(self._folder(number), whole=True) as folder:
            # Padded with zeros, so that names sort in shard order.
            writer = ShardWriter(folder, f"{number:0{len(str(max(self.shards - 1, 0)))}d}", keys, self.dtype)
            yield writer
            files = {
                path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in writer.close()
            }
            moments = {key: moments.to_dict() for key, moments in writer.moments.items()}
            write_json(folder / "shard.json", {"files": files, "moments": moments, **writer.notes}, indent=None)

    def finish(self, fingerprint: dict, report: dict) -> None:
        """All shards are whole: move them into place, write the report and, as the last thing, the fingerprint.

        `fingerprint` is what is known of the encoders; plan, statistics, dtype and checksums are added.
        """
        files, total = {}, {}
        for shard in range(self.shards):
            record = self.record(shard)
            files |= record["files"]
            for key, values in record["moments"].items():
                part = Moments.from_dict(values)
                total[key] = total[key].merge(part) if key in total else part
            for name in record["files"]:
                source, target = self._folder(shard) / name, self.path / name
                # Those that a killed process moved before are there.
                if source.exists() or not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    move(source, target)
        statistics = {key: moments.statistics() for key, moments in total.items()}
        side = statistics.get("image_embeds") or statistics["text_embeds"]
        unit = abs(side.norm_mean - 1) < UNIT_NORM_TOLERANCE and side.norm_std < UNIT_NORM_TOLERANCE
        content = {"format": 1, "kind": "store", "rows": side.count, "dtype": self.dtype, "normalized": unit}
        for key, name in (("image_embeds", "statistics"), ("text_embeds", "text_statistics")):
            if key in statistics:
                content[name] = statistics[key].to_dict()
        write_json(self.path / REPORT_FILE, report)
        # What is measured here is true of this store, whatever a given fingerprint says of another.
        write_json(self.path / FINGERPRINT_FILE, {"data": self._plan, **fingerprint, **content, "files": files})
        shutil.rmtree(self.partial)

    def _folder(self, shard: int) -> Path:
        return self.partial / f"shard_{shard:06d}"

    def _compare(self, there: dict, plan: dict) -> None:
        # Through JSON, so that tuples and lists compare equal.
        there, plan = flatten(there), flatten(json.loads(json.dumps(plan)))
        changed = [key for key in sorted(there.keys() | plan.keys()) if there.get(key) != plan.get(key)]
        if changed:
            differences = dict.fromkeys(_difference(key, there.get(key), plan.get(key)) for key in changed[:5])
            found = "; ".join(differences)
            raise CSDiffError(f"{self.path} holds another store: {found}; choose another output, or delete it.")


def _difference(key: str, there: object, now: object) -> str:
    if key.startswith("source."):
        return "it is of other images or captions"
    # The start of a hash tells as much as all of it.
    there, now = (f"{value[:8]}..." if len(str(value)) == 64 else repr(value) for value in (there, now))
    return f"{key} is {there} there and {now} now"


class ShardWriter:
    """The files of one shard, while they are written; `metadata` and `notes` (JSON-able) are set by the caller."""

    def __init__(self, folder: Path, number: str, keys: Sequence[str], dtype: str):
        self.metadata: pa.Table | None = None
        self.notes: dict = {}
        self.moments: dict[str, Moments] = {}
        self._folder, self._number = folder, number
        self._dtypes = {key: "bool" if key == "text_mask" else dtype for key in keys}
        self._files = {key: self._path(COLUMNS[key][0], "npy").open("wb") for key in keys}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def append(self, columns: dict[str, Tensor]) -> None:
        """Add rows (B, ...) to some of the columns; B may be 0, which tells the width of a shard without rows."""
        for key, rows in columns.items():
            stored = rows.detach().to("cpu", getattr(torch, self._dtypes[key])).contiguous()
            if key not in self._shapes:
                self._write_header(key, (0, *stored.shape[1:]))
            count = self._shapes[key][0]
            finite = stored.flatten(1).isfinite().all(1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                found = f"{float(rows[row].float().abs().max()):g} to be stored as {self._dtypes[key]}"
                raise CSDiffError(
                    f"{key}, row {count + row} of shard {self._number}: expected finite values, found {found}; use "
                    "dtype bfloat16 or float32, or precision float32."
                )
            if key in ("text_embeds", "image_embeds"):
                part = Moments.of(stored.float())
                self.moments[key] = self.moments[key].merge(part) if key in self.moments else part
            # npy has no bfloat16: the uint16 of its bits.
            bits = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
            self._files[key].write(bits.numpy().data)
            self._shapes[key] = (count + len(stored), *self._shapes[key][1:])

    def close(self) -> list[Path]:
        """Complete the files; where they are."""
        paths = []
        for key, file in self._files.items():
            self._write_header(key, self._shapes[key])
            file.close()
            paths.append(Path(file.name))
        if self.metadata is not None:
            paths.append(self._path(METADATA, "parquet"))
            pq.write_table(self.metadata, paths[-1])
        return paths

    def _path(self, name: str, suffix: str) -> Path:
        (self._folder / name).mkdir()
        return self._folder / name / f"{name}_{self._number}.{suffix}"

    def _write_header(self, key: str, shape: tuple[int, ...]) -> None:
        # numpy pads the header so that it has one length for any number of rows.
        self._files[key].seek(0)
        self._shapes[key] = shape
        header = {"descr": DTYPES[self._dtypes[key]], "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[key], header)


def write_store(
    path: str | Path,
    *,
    text_embeds: Tensor | None = None,
    image_embeds: Tensor | None = None,
    text_states: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    captions: Sequence[str] | None = None,
    image_ids: Sequence[str] | None = None,
    fingerprint: dict | None = None,
    dtype: str = "float16",
    shard_size: int = 10000,
) -> None:
    """Write a store from tensors in memory.

    Args:
        path: New folder.
        text_embeds: `(N, Dt)`.
        image_embeds: `(N, D)`.
        text_states: `(N, L, H)`.
        text_mask: `(N, L)` bool.
        image_tokens: `(N, V, H)`.
        captions: N captions.
        image_ids: N names; rows of one image share one.
        fingerprint: What is known of the encoders; `kind`, `dtype`, statistics and checksums are added.
        dtype: "float16", "bfloat16" or "float32".
        shard_size: Rows a shard.

    Raises:
        CSDiffError: No embeddings, columns of different lengths, or a folder that is in use.
    """
    given = (text_embeds, image_embeds, text_states, text_mask, image_tokens)
    columns = {key: column for key, column in zip(COLUMNS, given, strict=True) if column is not None}
    texts = {name: list(v) for name, v in (("caption", captions), ("image_id", image_ids)) if v is not None}
    lengths = {name: len(values) for name, values in {**columns, **texts}.items()}
    count = next(iter(lengths.values()), 0)
    if not {"text_embeds", "image_embeds"} & columns.keys() or set(lengths.values()) != {count} or not count:
        raise CSDiffError(f"{path}: expected text or image embeddings, all columns of one length, found {lengths}.")
    plan = {"rows": count, "dtype": dtype, "shard_size": shard_size}
    with StoreWriter(path, -(-count // shard_size), dtype) as writer:
        if writer.begin(plan):
            raise CSDiffError(f"{path} holds a store already; choose another folder, or delete it.")
        for number in range(writer.shards):
            part = slice(number * shard_size, (number + 1) * shard_size)
            with writer.shard(number, list(columns)) as shard:
                shard.append({key: column[part] for key, column in columns.items()})
                if texts:
                    shard.metadata = pa.table({name: pa.array(v[part], pa.string()) for name, v in texts.items()})
        writer.finish(fingerprint or {}, {"rows": count})
