"""The rows a run trains on and is measured on: opened, split, and refused where they do not fit together."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from torch import Tensor

from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.order import ImageGroups
from csdiff.embeddings.statistics import EmbeddingStatistics, Moments
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.split import held_out_split

DEFAULT_ENCODER = "tiny-clip"
_STATISTICS_ROWS = 1 << 17
_SIDES = {"unpaired_text": ("text",), "unpaired_image": ("image",)}


class Pairs:
    """Chosen rows of a store.

    Args:
        store: Where the rows are.
        rows: Row numbers in the store; all of them by default.

    Attributes:
        groups: The rows by image, where an epoch is to have one row of each; see `group_by_image`.
    """

    def __init__(self, store: EmbeddingStore, rows: np.ndarray | None = None):
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.groups: ImageGroups | None = None
        self._statistics: dict[str, EmbeddingStatistics] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch_rows(self) -> int:
        """Rows that an epoch has."""
        return len(self) if self.groups is None else len(self.groups)

    def group_by_image(self) -> None:
        """Let an epoch have one row of each image, where the store knows its images and some have several rows."""
        if self.store.knows_images:
            groups = ImageGroups(self.rows, self.store.image_numbers()[self.rows])
            self.groups = groups if len(groups) < len(self) else None

    def read(self, positions, keys: Sequence[str] = ("text_embeds", "image_embeds")) -> dict[str, Tensor]:
        """Rows by position among the chosen ones, as float32 tensors by column."""
        return self.store.read(self.rows[np.asarray(positions, dtype=np.int64)], keys)

    def all(self, keys: Sequence[str] = ("text_embeds", "image_embeds")) -> dict[str, Tensor]:
        """All rows at once."""
        return self.store.read(self.rows, keys)

    def sample(self, limit: int) -> "Pairs":
        """At most `limit` of the rows, evenly spread."""
        positions = np.unique(np.linspace(0, len(self) - 1, min(limit, len(self))).astype(np.int64))
        return Pairs(self.store, self.rows[positions])

    def statistics(self, key: str) -> EmbeddingStatistics:
        """Mean, deviation and norms of a column, from at most 131,072 rows.

        Raises:
            CSDiffError: one of these rows has NaN, infinity, or only zeros; named by file and row.
        """
        if key not in self._statistics:
            rows = self.sample(_STATISTICS_ROWS)
            parts = []
            for start in range(0, len(rows), 4096):
                part = rows.read(range(start, min(start + 4096, len(rows))), [key])[key]
                self._check(rows.rows[start:], key, part)
                parts.append(Moments.of(part))
            self._statistics[key] = reduce(Moments.merge, parts).statistics()
        return self._statistics[key]

    def _check(self, rows: np.ndarray, key: str, values: Tensor) -> None:
        norms = values.norm(dim=1)
        for what, wrong in (("NaN or infinity", ~norms.isfinite()), ("only zeros", norms == 0)):
            if wrong.any():
                first = self.store.place(key, int(rows[int(wrong.nonzero()[0])]))
                raise CSDiffError(
                    f"{self.store.path}: {first} has {what} ({int(wrong.sum())} of {len(values)} rows looked at): "
                    "embed these again, or leave them out."
                )

    def check(self, warn: bool = False) -> None:
        """Look at both sides; `warn` of one whose rows are all the same, of which nothing can be learned.

        Raises:
            CSDiffError: see `statistics`.
        """
        for key in ("text_embeds", "image_embeds"):
            found = self.statistics(key)
            if warn and found.std.max() <= 1e-6 * found.norm_mean:
                warnings.warn(
                    f"{self.store.path}: all {len(self)} {key.replace('_', ' ')} are the same, nothing can be learned "
                    "from them: look at how they were made.",
                    stacklevel=2,
                )


@dataclass
class TrainingData:
    """The data of a run.

    Attributes:
        train: Pairs to train on.
        validation: Held-out pairs, if any.
        unpaired_text: Captions without images, if any.
        unpaired_image: Images without captions, if any.
    """

    train: Pairs
    validation: Pairs | None
    unpaired_text: Pairs | None
    unpaired_image: Pairs | None

    @property
    def store(self) -> EmbeddingStore:
        """The store trained on."""
        return self.train.store

    def encoder(self, side: str) -> dict:
        """What the store's `csdiff.json` says of its text or image encoder; empty where it says nothing."""
        return self.fingerprint.get(f"{side}_encoder") or {}

    @property
    def fingerprint(self) -> dict:
        """Its `csdiff.json`; empty for a foreign store."""
        return self.store.fingerprint or {}


def open_data(config: TrainConfig, embed_dataset: Callable[[str, str], EmbeddingStore]) -> TrainingData:
    """Open every store of a run and split off held-out rows.

    Args:
        config: The run.
        embed_dataset: Makes a store of a captioned dataset, given its path and a name for the store.

    Raises:
        CSDiffError: a store is missing, damaged, too small, or does not fit the others.
    """
    data = config.data
    stores = {
        name: _open(name, getattr(data, name), embed_dataset)
        for name in ("train", "validation", "unpaired_text", "unpaired_image")
    }
    store = stores["train"]
    for side in ("text", "image"):
        if getattr(store, f"{side}_dim") is None:
            raise CSDiffError(f"--data.train {data.train} has no {side} embeddings: pairs need both.")
    if store.normalized and not data.accept_normalized:
        raise CSDiffError(
            f"--data.train {data.train} holds unit-norm embeddings: image decoders need the norms that were lost. "
            "Embed the data again with csdiff embed, or set --data.accept_normalized true for retrieval."
        )
    for name, other in stores.items():
        if other is not None and other is not store:
            _check_fits(name, other, store)
    train, validation = Pairs(store), None
    if stores["validation"] is not None:
        validation = Pairs(stores["validation"])
        if len(validation) < 2:
            raise CSDiffError(f"--data.validation {data.validation} has {len(validation)} rows, expected at least 2.")
    elif data.validation_fraction > 0:
        train, validation = (Pairs(store, rows) for rows in held_out_split(store, data.validation_fraction))
    if len(train) < 2:
        raise CSDiffError(f"--data.train {data.train} has {len(train)} row to train on, expected at least 2.")
    train.check(warn=True)
    if validation is not None:
        validation.check()
    if data.one_caption_per_image:
        train.group_by_image()
    if config.batch_size > train.epoch_rows:
        what, cure = ("pairs", "lower it or give more data")
        if train.groups is not None:
            what = "images"
            cure = (
                "lower it, or set --data.one_caption_per_image false, with which captions of one image meet in a batch"
            )
        raise CSDiffError(
            f"--batch_size {config.batch_size} is larger than the {train.epoch_rows} {what} to train on in "
            f"{data.train}: {cure}."
        )
    unpaired = {name: None if stores[name] is None else Pairs(stores[name]) for name in _SIDES}
    for name, pairs in unpaired.items():
        wanted = data.unpaired_batch_size or config.batch_size
        if pairs is not None and wanted > len(pairs):
            raise CSDiffError(
                f"--data.unpaired_batch_size {wanted} is larger than the {len(pairs)} rows of --data.{name}: lower it."
            )
    return TrainingData(train, validation, **unpaired)


def _open(name: str, path: str | None, embed_dataset: Callable[[str, str], EmbeddingStore]) -> EmbeddingStore | None:
    if path is None:
        return None
    if not Path(path).exists():
        raise CSDiffError(
            f"--data.{name} {path} does not exist: expected an embedding store (`csdiff embed` makes one) or a "
            "captioned dataset."
        )
    return EmbeddingStore.open(path) if is_store(path) else embed_dataset(path, name)


def _check_fits(name: str, other: EmbeddingStore, store: EmbeddingStore) -> None:
    for side in _SIDES.get(name, ("text", "image")):
        found, expected = getattr(other, f"{side}_dim"), getattr(store, f"{side}_dim")
        if found != expected:
            raise CSDiffError(
                f"--data.{name} {other.path} has {side} embeddings of width {found}, expected {expected} as in "
                f"{store.path}: embed both with one encoder."
            )
        mine, theirs = ((s.fingerprint or {}).get(f"{side}_encoder") for s in (store, other))
        check_same_encoder(mine, theirs, side, str(store.path), f"--data.{name} {other.path}")
    if other.normalized != store.normalized:
        words = {True: "unit-norm", False: "raw"}
        raise CSDiffError(
            f"--data.{name} {other.path} holds {words[other.normalized]} embeddings, {store.path} "
            f"{words[store.normalized]} ones: use two stores of one kind."
        )


def embed_dataset(
    config: TrainConfig, device: str, states: bool, tokens: bool, path: str, name: str
) -> EmbeddingStore:
    """The store of a captioned dataset, made now or by an earlier run; all processes share the work.

    Args:
        config: The run; names the encoders and the place.
        device: Where the encoders run.
        states: Keep token states of the text.
        tokens: Keep token states of the images.
        path: Dataset in any form that `csdiff embed` reads.
        name: `train`, `validation`, `unpaired_text` or `unpaired_image`; the last two are embedded on one side only.

    Raises:
        CSDiffError: nothing to read, no such encoder, or a store there that was made otherwise.
    """
    base = Path(config.data.store) if config.data.store else Path(config.output_dir) / "store"
    sides = _SIDES.get(name, ("text", "image"))
    embed(
        EmbedConfig(
            source=path,
            output=str(base / name),
            text_encoder=(config.data.text_encoder or DEFAULT_ENCODER) if "text" in sides else None,
            image_encoder=(config.data.image_encoder or DEFAULT_ENCODER) if "image" in sides else None,
            text_states=states and "text" in sides,
            image_tokens=tokens and "image" in sides,
            allow_outside=config.data.allow_outside,
            device=device,
            progress=config.logging.progress,
        )
    )
    return EmbeddingStore.open(base / name)
