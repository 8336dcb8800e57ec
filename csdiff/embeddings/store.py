"""The embedding store: cached text and image embeddings on disk, memory-mapped, in the clip-retrieval layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
from torch import Tensor

from csdiff.embeddings.statistics import UNIT_NORM_TOLERANCE, EmbeddingStatistics, Moments
from csdiff.embeddings.store_files import (
    FINGERPRINT_FILE,
    PARTIAL_FOLDER,
    Column,
    ShardedMetadata,
    check_files,
    open_columns,
    read_fingerprint,
)
from csdiff.errors import CSDiffError
from csdiff.files import absolute
from csdiff.kinds import is_store  # noqa: F401  one of the questions about a store

# Rows of each side that are looked at when a store is opened.
SAMPLE = 1024
# The part of them with norm 1 from which raw rows are no accident.
UNIT_SHARE = 0.02
# Statistics of a store that does not state them are taken over this many rows, evenly spread in blocks.
STATISTICS_SAMPLE = 1 << 18
# A store up to this size is compared with its checksums whenever it is opened (about a second).
VERIFY_BYTES = 512 << 20

Indices = Sequence[int] | np.ndarray | Tensor | slice | range


class EmbeddingStore:
    """Cached embeddings of captions and images, row i of every column belonging together.

    A folder in the clip-retrieval layout: `text_emb/text_emb_{k}.npy`, `img_emb/img_emb_{k}.npy` and optionally
    `metadata/metadata_{k}.parquet`; csdiff adds `text_states`, `text_mask`, `image_tokens` and `csdiff.json`, the
    fingerprint that says which encoders wrote it. Rows are read in any order, as float32, through memory maps: a store
    may be larger than memory.

    ```python
    store = EmbeddingStore.open("stores/coco")
    batch = store.read([5, 0, 12])
    batch["text_embeds"], batch["image_embeds"]  # (3, Dt), (3, D)
    ```

    Attributes:
        path: The folder.
        fingerprint: Content of `csdiff.json`, or None for a foreign folder.
        keys: The columns there are, as `read` names them.
        metadata: Further columns, by `metadata.names`, or None.
        text_dim, image_dim: Widths of the embeddings, None where there are none.
        normalized: Whether rows (image rows, if there are any) were divided by their norm before they were written.
            Decoders cannot use such rows; retrieval can.
    """

    def __init__(
        self, path: Path, fingerprint: dict | None, columns: dict[str, Column], metadata: ShardedMetadata | None
    ):
        self.path, self.fingerprint, self.metadata = path, fingerprint, metadata
        self._columns, self.keys = columns, tuple(columns)
        widths = {key: column.row_shape[-1] for key, column in columns.items()}
        self.text_dim, self.image_dim = widths.get("text_embeds"), widths.get("image_embeds")
        stated = None if fingerprint is None else fingerprint.get("normalized")
        unit = [self._look_at(key) for key in ("text_embeds", "image_embeds") if key in columns]
        self.normalized: bool = unit[-1] if stated is None else stated
        self._statistics: dict[str, EmbeddingStatistics] = {}
        for key, name in (("image_embeds", "statistics"), ("text_embeds", "text_statistics")):
            values = (fingerprint or {}).get(name) or {}
            if "mean" in values:
                where = f"{path / FINGERPRINT_FILE}: {name}"
                self._statistics[key] = EmbeddingStatistics.from_dict(values, where)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool | None = None) -> EmbeddingStore:
        """Open a store and check that it is whole.

        Headers, file sizes and row counts are always checked, and a sample of the rows. A folder without `csdiff.json`
        opens with a warning that says what is unknown; others warn of rows of zeros, of one constant row, and of unit
        rows among raw ones.

        Args:
            path: The folder.
            verify: Compare every file with its checksum in `csdiff.json`; None does so up to 512 MiB.

        Raises:
            CSDiffError: No store there, an unfinished one, a missing or corrupt shard (named, with the expected and
                the found checksum), shards that do not fit together, or rows that are not finite.
        """
        path = absolute(path)
        if not path.is_dir():
            raise CSDiffError(f"{path}: expected an embedding store, found no folder; make one with `csdiff embed`.")
        fingerprint = read_fingerprint(path)
        if fingerprint is None and (path / PARTIAL_FOLDER).exists():
            raise CSDiffError(f"{path}: this store is not finished; run the same `csdiff embed` again, it goes on.")
        files = (fingerprint or {}).get("files") or {}
        if verify is None:
            verify = sum(file["bytes"] for file in files.values()) <= VERIFY_BYTES
        check_files(path, files, checksums=verify)
        store = cls(path, fingerprint, *open_columns(path, fingerprint or {}))
        if fingerprint is None:
            norms = "all rows sampled have norm 1" if store.normalized else "norms vary, so the rows look raw"
            warnings.warn(
                f"{path} has no {FINGERPRINT_FILE}: unknown are the encoders, the tokenizer, the preprocessing and "
                f"the checksums; {norms}. It is on you that these embeddings fit the encoders used later.",
                stacklevel=2,
            )
        return store

    def __len__(self) -> int:
        return int(next(iter(self._columns.values())).starts[-1])

    def __repr__(self) -> str:
        dims = f"text_dim={self.text_dim}, image_dim={self.image_dim}"
        return f"EmbeddingStore({str(self.path)!r}, rows={len(self)}, {dims})"

    @property
    def statistics(self) -> EmbeddingStatistics | None:
        """Statistics of the image embeddings (None without images)."""
        return self._side_statistics("image_embeds")

    @property
    def text_statistics(self) -> EmbeddingStatistics | None:
        """Statistics of the text embeddings (None without text)."""
        return self._side_statistics("text_embeds")

    def read(self, indices: Indices, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Rows in any order, repeats allowed.

        Args:
            indices: Row numbers, or a slice or range of them.
            keys: Columns to read; all of them by default.

        Returns:
            `text_embeds` (B, Dt), `image_embeds` (B, D), `text_states` (B, L, H) and `image_tokens` (B, V, H) in
            float32, `text_mask` (B, L) as bool; those that the store has.

        Raises:
            CSDiffError: A row is not finite.
            IndexError: A row number outside 0..N-1.
            KeyError: A column that the store does not have.
        """
        rows = self._row_numbers(indices)
        return {key: self._column(key).gather(rows) for key in (self.keys if keys is None else keys)}

    def blocks(self, size: int = 8192, keys: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """All rows in order, `size` at a time, read sequentially: one pass over a store larger than memory."""
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size), keys)

    def place(self, key: str, row: int) -> str:
        """Where a row of a column is on the disk, for messages: "row 3 of img_emb/img_emb_0.npy"."""
        return self._column(key).place(row)

    def captions(self, indices: Indices) -> list[str]:
        """Captions of these rows; once asked for, all are held in memory (about 80 MB a million). See `column`."""
        return self.column("caption", indices)

    def image_ids(self, indices: Indices) -> list[str]:
        """Identity of the image of each row: rows with several captions of one image share it. See `column`."""
        return self.column("image_id", indices)

    @property
    def knows_images(self) -> bool:
        """Whether the metadata says which rows share an image."""
        return self.metadata is not None and "image_id" in self.metadata.names

    def image_numbers(self) -> np.ndarray:
        """Number (N,) int64 of the image of every row, equal for the captions of one image. See `column`."""
        self.image_ids([])
        return self.metadata.codes("image_id")

    def column(self, name: str, indices: Indices = slice(None)) -> list:
        """Any column of the metadata, see `metadata.names`.

        Raises:
            CSDiffError: There is none of that name.
        """
        if self.metadata is None or name not in self.metadata.names:
            found = "no metadata folder" if self.metadata is None else f"only {', '.join(self.metadata.names)}"
            raise CSDiffError(f"{self.path}: expected the column {name!r} in metadata/*.parquet, found {found}.")
        return self.metadata.take(name, self._row_numbers(indices))

    def verify(self) -> None:
        """Compare every file with its checksum; CSDiffError names one that differs, or says that none are known."""
        if not self.fingerprint or not self.fingerprint.get("files"):
            raise CSDiffError(
                f"{self.path} has no checksums to verify: its {FINGERPRINT_FILE} is missing or lists none."
            )
        check_files(self.path, self.fingerprint["files"], checksums=True)

    def _column(self, key: str) -> Column:
        if key not in self._columns:
            raise KeyError(f"{self.path} has no {key}; it has {', '.join(self.keys)}")
        return self._columns[key]

    def _row_numbers(self, indices: Indices) -> np.ndarray:
        if isinstance(indices, slice):
            return np.arange(*indices.indices(len(self)), dtype=np.int64)
        rows = np.ascontiguousarray(np.asarray(indices), dtype=np.int64).reshape(-1)
        wrong = rows[(rows < 0) | (rows >= len(self))]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} is outside 0..{len(self) - 1} of {self.path}")
        return rows

    def _look_at(self, key: str) -> bool:
        """Whether all rows of a sample of a side have norm 1; warns of what training would stumble over."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(np.int64))
        values = self._columns[key].gather(rows)
        norms, side = values.norm(dim=-1), key.removesuffix("_embeds")

        def warn(wrong: Tensor, fact: str) -> None:
            share, first = float(wrong.double().mean()), int(rows[int(wrong.nonzero()[0])])
            looked = f"{share:.1%} of the {side} rows looked at, for example {self.place(key, first)}, "
            warnings.warn(f"{self.path}: {looked}{fact}", stacklevel=5)

        if bool((norms == 0).any()):
            warn(norms == 0, "hold only zeros; images or captions failed where they were made.")
        elif len(rows) > 1 and bool((values == values[0]).all()):
            warn(norms >= 0, "are the same: nothing can be learned from them; look at how they were made.")
        deviation = (norms - 1).abs()
        if bool((deviation < UNIT_NORM_TOLERANCE).all()):
            return True
        # Narrower: raw rows of some encoders have norms about 1.
        unit = deviation < UNIT_NORM_TOLERANCE / 5
        if float(unit.double().mean()) > UNIT_SHARE:
            warn(unit, "have norm 1, the others have not: unit and raw embeddings are mixed; embed all with one tool.")
        return False

    def _side_statistics(self, key: str) -> EmbeddingStatistics | None:
        if key in self._columns and key not in self._statistics:
            block, starts = 4096, np.arange(0, len(self), 4096)
            if len(self) > STATISTICS_SAMPLE:
                starts = np.linspace(0, len(self) - block, STATISTICS_SAMPLE // block).astype(np.int64)
            parts = (self.read(slice(start, start + block), [key])[key] for start in starts.tolist())
            self._statistics[key] = reduce(Moments.merge, map(Moments.of, parts)).statistics()
        return self._statistics.get(key)
