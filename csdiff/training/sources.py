"""Opening the data of a run, and refusing what does not fit together before anything is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.data import Pairs, held_out_split


@dataclass
class Sources:
    """The data of a run.

    Attributes:
        train: Pairs to train on.
        validation: Held-out pairs, if any.
        unpaired_text: Captions without pictures, if any.
        unpaired_image: Pictures without captions, if any.
    """

    train: Pairs
    validation: Pairs | None
    unpaired_text: Pairs | None
    unpaired_image: Pairs | None

    @property
    def store(self) -> EmbeddingStore:
        """The store trained on."""
        return self.train.store

    @property
    def fingerprint(self) -> dict:
        """Its `csdiff.json`; empty for a foreign store."""
        return self.store.fingerprint or {}


def open_sources(config: TrainConfig, embed: Callable[[str, str], EmbeddingStore]) -> Sources:
    """Open every store of a run and split off held-out rows.

    Args:
        config: The run.
        embed: Makes a store of a captioned dataset, given its path and a name for the store.

    Raises:
        CSDiffError: a store is missing, damaged, too small, or does not fit the others.
    """
    data = config.data
    opened = {
        name: _open(name, getattr(data, name), embed)
        for name in ("train", "validation", "unpaired_text", "unpaired_image")
    }
    store = opened["train"]
    for name, missing in {"text": store.text_dim is None, "image": store.image_dim is None}.items():
        if missing:
            raise CSDiffError(f"--data.train {data.train} has no {name} embeddings: pairs need both.")
    if store.normalized and not data.accept_normalized:
        raise CSDiffError(
            f"--data.train {data.train} holds unit-norm embeddings: image decoders need the norms that were lost. "
            "Embed the data again with csdiff embed, or set --data.accept_normalized true for retrieval."
        )
    for name, other in opened.items():
        if other is not None and other is not store:
            _check_fits(name, other, store)
    train, validation = Pairs(store), None
    if opened["validation"] is not None:
        validation = Pairs(opened["validation"])
        if len(validation) < 2:
            raise CSDiffError(f"--data.validation {data.validation} has {len(validation)} rows, expected at least 2.")
    elif data.validation_fraction > 0:
        rows, held_out = held_out_split(store, data.validation_fraction)
        train, validation = Pairs(store, rows), Pairs(store, held_out)
    if len(train) < 2:
        raise CSDiffError(f"--data.train {data.train} has {len(train)} row to train on, expected at least 2.")
    train.warn_of_constants()
    if validation is not None:
        for key in ("text_embeds", "image_embeds"):
            validation.statistics(key)
    if data.one_caption_per_image:
        train.group_by_image()
    if train.groups is not None and config.batch_size > len(train.groups):
        raise CSDiffError(
            f"--batch_size {config.batch_size} is larger than the {len(train.groups)} pictures to train on in "
            f"{data.train}: lower it, or set --data.one_caption_per_image false, with which captions of one picture "
            "meet in a batch."
        )
    if config.batch_size > len(train):
        raise CSDiffError(
            f"--batch_size {config.batch_size} is larger than the {len(train)} pairs to train on in {data.train}: "
            "lower it or give more data."
        )
    unpaired = {
        name: None if opened[name] is None else Pairs(opened[name]) for name in ("unpaired_text", "unpaired_image")
    }
    for name, pairs in unpaired.items():
        wanted = config.data.unpaired_batch_size or config.batch_size
        if pairs is not None and wanted > len(pairs):
            raise CSDiffError(
                f"--data.unpaired_batch_size {wanted} is larger than the {len(pairs)} rows of --data.{name}: lower it."
            )
    return Sources(train, validation, unpaired["unpaired_text"], unpaired["unpaired_image"])


def _open(name: str, path: str | None, embed: Callable[[str, str], EmbeddingStore]) -> EmbeddingStore | None:
    if path is None:
        return None
    if not Path(path).exists():
        raise CSDiffError(
            f"--data.{name} {path} does not exist: expected an embedding store (`csdiff embed` makes one) or a "
            "captioned dataset."
        )
    return EmbeddingStore.open(path) if is_store(path) else embed(path, name)


def _check_fits(name: str, other: EmbeddingStore, store: EmbeddingStore) -> None:
    for side in {"unpaired_text": ("text",), "unpaired_image": ("image",)}.get(name, ("text", "image")):
        found, expected = getattr(other, f"{side}_dim"), getattr(store, f"{side}_dim")
        if found != expected:
            raise CSDiffError(
                f"--data.{name} {other.path} has {side} embeddings of width {found}, expected {expected} as in "
                f"{store.path}: embed both with one encoder."
            )
        mine, theirs = ((s.fingerprint or {}).get(f"{side}_encoder") or {} for s in (store, other))
        check_same_encoder(mine, theirs, side, str(store.path), f"--data.{name} {other.path}")
    if other.normalized != store.normalized:
        words = {True: "unit-norm", False: "raw"}
        raise CSDiffError(
            f"--data.{name} {other.path} holds {words[other.normalized]} embeddings, {store.path} "
            f"{words[store.normalized]} ones: use two stores of one kind."
        )
