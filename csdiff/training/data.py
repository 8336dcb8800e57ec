"""The rows a run trains on and is measured on: opened, split, and refused where they do not fit together."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from torch import Tensor

from csdiff.adapters.registry import ADAPTERS
from csdiff.data.items import HOW_TO_CAPTION
from csdiff.data.opening import open_source
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.embeddings.loader import ImageGroups
from csdiff.embeddings.statistics import EmbeddingStatistics, Moments
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.kinds import is_store
from csdiff.training.config import TrainConfig

DEFAULT_ENCODER = "tiny-clip"
_STATISTICS_ROWS = 1 << 17
_HELD_OUT_LIMIT = 20_000
# Stores up to this many rows are split exactly; larger ones by a threshold on a hash, in one pass without a table.
_EXACT_SPLIT = 200_000
_SIDES = {"unpaired_text": ("text",), "unpaired_image": ("image",)}


class Pairs:
    """Chosen rows of a store, by default all; in `groups` by image, where an epoch is to have one row of each."""

    def __init__(self, store: EmbeddingStore, rows: np.ndarray | None = None):
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.groups: ImageGroups | None = None
        self._statistics: dict[str, EmbeddingStatistics] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch_rows(self) -> int:
        return len(self) if self.groups is None else len(self.groups)

    def group_by_image(self) -> None:
        """Let an epoch have one row of each image, where the store knows its images and some have several rows."""
        if self.store.knows_images:
            groups = ImageGroups(self.rows, self.store.image_numbers()[self.rows])
            self.groups = groups if len(groups) < len(self) else None

    def read(self, positions, keys: Sequence[str] = ("text_embeds", "image_embeds")) -> dict[str, Tensor]:
        """Rows by position among the chosen ones, as float32 tensors by column."""
        return self.store.read(self.rows[positions], keys)

    def sample(self, limit: int) -> "Pairs":
        """At most `limit` of the rows, evenly spread."""
        positions = np.unique(np.linspace(0, len(self) - 1, min(limit, len(self))).astype(np.int64))
        return Pairs(self.store, self.rows[positions])

    def statistics(self, key: str) -> EmbeddingStatistics:
        """Of a column, from at most 131,072 rows; CSDiffError if one of them has NaN, infinity, or only zeros."""
        if key in self._statistics:
            return self._statistics[key]
        rows, parts = self.sample(_STATISTICS_ROWS), []
        for start in range(0, len(rows), 4096):
            part = rows.read(slice(start, start + 4096), [key])[key]
            zero = (part.norm(dim=1) == 0).nonzero()
            if len(zero):
                place = self.store.place(key, int(rows.rows[start + int(zero[0])]))
                raise CSDiffError(f"{self.store.path}: {place} has only zeros: embed it again, or leave it out.")
            parts.append(Moments.of(part))
        return self._statistics.setdefault(key, reduce(Moments.merge, parts).statistics())


@dataclass
class TrainingData:
    groups: dict[str, Pairs]  # what a batch has rows of: `pairs`, and `unpaired_text`, `unpaired_image` where given
    batch_sizes: dict[str, int]  # rows of a batch by group, over all processes
    validation: Pairs | None  # held-out pairs

    @property
    def train(self) -> Pairs:
        return self.groups["pairs"]

    @property
    def store(self) -> EmbeddingStore:
        return self.train.store

    @property
    def fingerprint(self) -> dict:
        """Its `csdiff.json`; empty for a foreign store."""
        return self.store.fingerprint or {}

    def encoder(self, side: str) -> dict:
        """What `csdiff.json` says of the store's text or image encoder; empty where it says nothing."""
        return self.fingerprint.get(f"{side}_encoder") or {}


def wants_tokens(config: TrainConfig) -> bool:
    """Whether the objective is to see tokens: its `token_weight` is given and not 0."""
    return bool(config.objective_options.get("token_weight"))


def reads_states(config: TrainConfig) -> bool:
    """Whether the adapter or the token term reads token states of a frozen text encoder."""
    adapter = ADAPTERS[config.adapter]
    if adapter.uses_input_ids:
        return False
    reads = adapter.uses_text_states
    if not isinstance(reads, bool):
        reads = config.adapter_options.get("encoder_hid_proj_type", "linear") is not None
    return reads or wants_tokens(config)


def open_data(config: TrainConfig, device: str = "cpu") -> TrainingData:
    """Open every store of a run and split off held-out rows; captioned datasets are embedded first, on a device.

    Raises:
        CSDiffError: a store is missing, damaged, too small, or does not fit the others.
    """
    data = config.data
    for name in ("train", "validation", *_SIDES):
        _check_source(name, config)
    stores = {name: _open(name, config, device) for name in ("train", "validation", *_SIDES)}
    store = stores["train"]
    for side in ("text", "image"):
        if getattr(store, f"{side}_dim") is None:
            raise CSDiffError(f"--data.train {data.train} has no {side} embeddings: pairs need both.")
    if store.normalized and not data.accept_normalized:
        raise CSDiffError(
            f"--data.train {data.train} holds unit-norm embeddings, and image decoders need the norms: embed the data "
            "with csdiff embed, or set --data.accept_normalized true for retrieval."
        )
    for name, other in stores.items():
        if other is not None:
            _check_fits(name, other, store)
    train, validation = Pairs(store), None
    if stores["validation"] is not None:
        validation = Pairs(stores["validation"])
    elif data.validation_fraction > 0:
        train, validation = _split(store, data.validation_fraction)
    for name, pairs in (("train", train), ("validation", validation)):
        if pairs is None:
            continue
        if len(pairs) < 2:
            raise CSDiffError(f"--data.{name}: {pairs.store.path} has {len(pairs)} row for it, expected at least 2.")
        for key in ("text_embeds", "image_embeds"):
            pairs.statistics(key)
    if data.one_caption_per_image:
        train.group_by_image()
    groups = {"pairs": train} | {name: Pairs(stores[name]) for name in _SIDES if stores[name] is not None}
    sizes = {name: (name != "pairs" and data.unpaired_batch_size) or config.batch_size for name in groups}
    for name, pairs in groups.items():
        if sizes[name] > (most := pairs.epoch_rows):
            option = "--data.unpaired_batch_size" if name != "pairs" and data.unpaired_batch_size else "--batch_size"
            rows, cure = name.replace("_", " "), f"give {option} {most}"
            if pairs.groups is not None:
                rows, cure = "images", f"{cure}, or set --data.one_caption_per_image false"
            found = f"{most} {rows} of {pairs.store.path}"
            raise CSDiffError(f"{option} {sizes[name]}: expected at most {found}; {cure}.")
    return TrainingData(groups, sizes, validation)


def _check_source(name: str, config: TrainConfig) -> None:
    """Refuse what can be no part of the training data before anything is embedded."""
    path, sides = getattr(config.data, name), _SIDES.get(name, ("text", "image"))
    if path is None or is_store(path):
        return
    if not Path(path).exists():
        raise CSDiffError(f"--data.{name} {path} does not exist: expected an embedding store or a captioned dataset.")
    source = open_source(path, allow_outside=config.data.allow_outside)
    if "text" in sides and not source.has_captions:
        raise CSDiffError(f"--data.{name} {path}: expected captions, found images alone; {HOW_TO_CAPTION}.")
    if "image" in sides and not source.has_images:
        raise CSDiffError(f"--data.{name} {path}: expected images, found captions alone; name a dataset with images.")


def _open(name: str, config: TrainConfig, device: str) -> EmbeddingStore | None:
    """The store of an option; of a captioned dataset made now or by an earlier run, all processes share the work."""
    path, data, sides = getattr(config.data, name), config.data, _SIDES.get(name, ("text", "image"))
    if path is None:
        return None
    if is_store(path):
        return EmbeddingStore.open(path)
    output = (Path(data.store) if data.store else Path(config.output_dir) / "store") / name
    embed(
        EmbedConfig(
            source=path,
            output=str(output),
            text_encoder=(data.text_encoder or DEFAULT_ENCODER) if "text" in sides else None,
            image_encoder=(data.image_encoder or DEFAULT_ENCODER) if "image" in sides else None,
            text_states="text" in sides and reads_states(config) and data.text != "online",
            image_tokens="image" in sides and wants_tokens(config) and data.image != "online",
            allow_outside=data.allow_outside,
            device=device,
            progress=config.logging.progress,
        )
    )
    return EmbeddingStore.open(output)


def _check_fits(name: str, other: EmbeddingStore, store: EmbeddingStore) -> None:
    where = f"--data.{name} {other.path}"
    for side in _SIDES.get(name, ("text", "image")):
        found, expected = getattr(other, f"{side}_dim"), getattr(store, f"{side}_dim")
        if found != expected:
            raise CSDiffError(
                f"{where} has {side} embeddings of width {found}, expected {expected} as in {store.path}."
            )
        mine, theirs = ((s.fingerprint or {}).get(f"{side}_encoder") for s in (store, other))
        check_same_encoder(mine, theirs, side, str(store.path), where)
    if other.normalized != store.normalized:
        found, expected = ("unit-norm" if s.normalized else "raw" for s in (other, store))
        raise CSDiffError(f"{where} holds {found} embeddings, expected {expected} ones as in {store.path}.")


def _split(store: EmbeddingStore, fraction: float) -> tuple[Pairs, Pairs]:
    """Rows to train on and to hold out, by image, the same for every run on the same data.

    Images are told apart by the store's `image_id`, else by their embedding (in stores too large for that, by row).
    About `fraction` of the rows is held out, at most 20,000.
    """
    count = len(store)
    target = min(max(round(fraction * count), 2), _HELD_OUT_LIMIT, count)
    codes = np.concatenate([_codes(store, range(start, min(start + 8192, count))) for start in range(0, count, 8192)])
    if count > _EXACT_SPLIT:
        held_out = codes < target / count * 2**32
    else:
        # Rows of one image share a code; there are to be two images at least.
        held_out = codes <= max(np.sort(codes)[target - 1], np.unique(codes)[:2][-1])
    if held_out.all() or not held_out.any():
        raise CSDiffError(
            f"{store.path}: holding out {fraction:.0%} of {count} rows by image leaves none on one side: give "
            "--data.validation, or --data.validation_fraction 0."
        )
    return Pairs(store, np.flatnonzero(~held_out)), Pairs(store, np.flatnonzero(held_out))


def _codes(store: EmbeddingStore, rows: range) -> np.ndarray:
    """Well-spread 32-bit codes of the images of these rows."""
    if store.knows_images:
        keys = [str(value).encode() for value in store.image_ids(rows)]
    elif len(store) <= _EXACT_SPLIT:
        keys = [row.tobytes() for row in store.read(rows, keys=["image_embeds"])["image_embeds"].numpy()]
    else:
        keys = [b"%d" % row for row in rows]
    codes = np.fromiter((zlib.crc32(key) for key in keys), dtype=np.uint32, count=len(keys))
    # crc32 is linear: neighbouring numbers land in a pattern. The finaliser of murmur3 breaks it up.
    codes ^= codes >> np.uint32(16)
    codes *= np.uint32(0x85EBCA6B)
    codes ^= codes >> np.uint32(13)
    codes *= np.uint32(0xC2B2AE35)
    return codes ^ (codes >> np.uint32(16))
