"""Pairs for an evaluation: opened, checked against the adapters, read, and what an adapter predicts for them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from csdiff.data.opening import open_source
from csdiff.embeddings import load_caption_tokenizer, load_text_encoder
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.encoders import find_encoder
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.embedding_metrics import require_images
from csdiff.evaluation.retrieval import first_rows, image_identities
from csdiff.kinds import is_store
from csdiff.pipelines.decoders import AdapterCard
from csdiff.pipelines.embedding import text_encoder_options

CONCEPT_COLUMNS = ("concept", "label")


@dataclass
class HeldOutPairs:
    """Rows of a store, in memory."""

    source: str
    """What was asked for."""
    store: EmbeddingStore
    rows: np.ndarray
    """`(N,)` their numbers in the store."""
    text: Tensor
    """`(N, Dt)` raw text embeddings."""
    image: Tensor
    """`(N, D)` raw image embeddings."""
    image_ids: Tensor
    """`(N,)` image of each row."""
    concepts: list[str] | None = None
    """N names of what the images show, where the metadata say."""
    split: str | None = None
    """Of a source that is no store."""

    @property
    def pictures(self) -> int:
        """How many different images."""
        return len(first_rows(self.image_ids))

    def describe(self) -> dict:
        """What the manifest says of them."""
        digest = hashlib.sha256()
        for part in (self.text, self.image, self.image_ids):
            digest.update(part.contiguous().numpy().tobytes())
        fingerprint = self.store.fingerprint or {}
        return {
            "source": self.source,
            "split": self.split,
            "rows": len(self.rows),
            "rows_of": len(self.store),
            "pictures": self.pictures,
            "embeddings_sha256": digest.hexdigest(),
            **{name: fingerprint.get(name) for name in ("text_encoder", "image_encoder")},
        }


def check_source(path: str, card: AdapterCard) -> None:
    """A CSDiffError where nothing is there, or the adapter does not say which encoders to embed it with."""
    if is_store(path):
        return
    if not Path(path).exists():
        raise CSDiffError(f"{path}: expected an embedding store, or captions with images, found nothing there.")
    for tower in ("text", "image"):
        find_encoder(card.metadata.get(f"{tower}_encoder"), tower, of=f"the adapter {card.path}")


@contextmanager
def open_store(
    path: str, card: AdapterCard, device: str, split: str, concepts: str | None = None, progress: bool = False
) -> Iterator[tuple[EmbeddingStore, str | None]]:
    """A store as it is, or captions with images embedded into a passing one with the encoders of an adapter.

    Beside it the split, of a source that has some. Raises what :func:`check_source` raises.
    """
    check_source(path, card)
    if is_store(path):
        yield EmbeddingStore.open(path), None
        return
    from csdiff.embeddings.extraction import embed

    columns = [concepts] if concepts else []
    if not concepts and Path(path).suffix == ".parquet":
        with suppress(OSError, ValueError):  # What is wrong with it, the reader says.
            columns = [name for name in CONCEPT_COLUMNS if name in pq.read_schema(path).names][:1]
    source = open_source(path, split=split, metadata_columns=columns)
    text, image = (card.metadata[f"{side}_encoder"] for side in ("text", "image"))
    options = text_encoder_options(text, card.metadata)
    with tempfile.TemporaryDirectory(prefix="csdiff-evaluate-") as folder:
        config = EmbedConfig(
            source=path,
            output=f"{folder}/store",
            text_encoder=text["id"],
            text_revision=options.pop("revision"),
            image_encoder=image["id"],
            image_revision=image.get("revision"),
            metadata_columns=columns,
            **options,
            dtype="float32",
            device=device,
            progress=progress,
        )
        embed(config, source)
        yield EmbeddingStore.open(config.output), split if source.splits else None


def read_pairs(
    source: str,
    store: EmbeddingStore,
    max_rows: int | None = None,
    concepts: str | None = None,
    split: str | None = None,
) -> HeldOutPairs:
    """At most `max_rows` pairs of a store, evenly spread; `source` and `split` are what was asked for.

    `concepts` is the metadata column of what an image shows, by default concept or label, where there is one.

    Raises:
        CSDiffError: one side or the column is missing, there are too few images, or a row is not finite.
    """
    for side in ("text", "image"):
        if getattr(store, f"{side}_dim") is None:
            raise CSDiffError(f"{source}: expected text and image embeddings, found no {side} embeddings.")
    count = len(store) if max_rows is None else min(max_rows, len(store))
    rows = np.unique(np.linspace(0, len(store) - 1, count).astype(np.int64))
    text, image = store.read(rows, ["text_embeds", "image_embeds"]).values()
    ids = torch.from_numpy(store.image_numbers()[rows]) if store.knows_images else image_identities(image)
    known = store.metadata.names if store.metadata is not None else ()
    column = concepts or next((name for name in CONCEPT_COLUMNS if name in known), None)
    names = [str(name) for name in store.column(column, rows)] if column else None
    pairs = HeldOutPairs(source, store, rows, text, image, ids, names, split)
    require_images(pairs.pictures)
    return pairs


def training_store(card: AdapterCard) -> str | None:
    """The store that an adapter was trained on, if it is still there and the same.

    It is the one that `csdiff.json` names, or the one that the run embedded its data into, in its own folder.
    """
    data = card.metadata.get("data") or {}
    for path in (data.get("train"), data.get("store"), str(card.path / "store" / "train")):
        if isinstance(path, str) and is_store(path):
            with suppress(CSDiffError):
                if (EmbeddingStore.open(path).fingerprint or {}).get("data") == data.get("source"):
                    return path
    return None


def check_fits(card: AdapterCard, store: EmbeddingStore, source: str) -> None:
    """A CSDiffError for a store of other dimensions, of other encoders, or of rows without their norms."""
    norms = {True: "unit-norm", False: "raw"}
    for what, expected, found in (
        ("embeddings that are", norms[bool(card.metadata.get("normalized"))], norms[store.normalized]),
        ("text embeddings of width", card.text_dim, store.text_dim),
        ("image embeddings of width", card.embedding_dim, store.image_dim),
    ):
        if found not in (None, expected):
            raise CSDiffError(
                f"{source}: expected {what} {expected}, as the adapter {card.path} was trained on, found {found}; "
                "embed the data with the adapter's encoders."
            )
    for side in ("text", "image"):
        records = (record.get(f"{side}_encoder") for record in (card.metadata, store.fingerprint or {}))
        check_same_encoder(*records, side, str(card.path), source)


@torch.no_grad()
def predict(card: AdapterCard, pairs: HeldOutPairs, device: str | torch.device = "cpu", seed: int = 0) -> Tensor:
    """Predicted raw image embeddings `(N, D)` of the rows of `pairs`, on the CPU.

    Token states that the adapter reads and the store does not have are encoded from the captions, as are the captions
    for an adapter inside the text encoder. Adapters that sample draw their noise from `seed`.

    Raises:
        CSDiffError: captions or an encoder are needed and not known, or predictions are not finite.
    """
    from csdiff.adapters import AutoAdapter

    known, store = card.metadata.get("text_encoder") or {}, pairs.store
    moved = {"text_encoder": known["id"]} if card.kind == "LoRAAdapter" and Path(known.get("id", "")).is_dir() else {}
    adapter = AutoAdapter.from_pretrained(card.path, **moved).to(device).eval()
    encoder, size = None, 512
    if adapter.uses_input_ids or (adapter.uses_text_states and "text_states" not in store.keys):
        known = {"id": adapter.config.get("text_encoder"), **known}
        known = find_encoder(known, "text", of=f"the adapter {card.path}")
        if adapter.uses_input_ids:
            tokenize = load_caption_tokenizer(known["id"])
        else:
            encoder, size = load_text_encoder(known["id"], device, **text_encoder_options(known, card.metadata)), 64
    generator = torch.Generator().manual_seed(seed)

    def embed(rows: Tensor, text: Tensor) -> Tensor:
        if adapter.uses_input_ids:
            return adapter.embed_input_ids(*(tokens.to(device) for tokens in tokenize(store.captions(rows))))
        tokens = ()
        if encoder is not None:
            encoding = encoder.encode(store.captions(rows))
            tokens = encoding.states.float(), encoding.mask
        elif adapter.uses_text_states:
            tokens = (value.to(device) for value in store.read(rows, ["text_states", "text_mask"]).values())
        return adapter.embed(text.to(device), *tokens, generator=generator)

    blocks = zip(torch.from_numpy(pairs.rows).split(size), pairs.text.split(size), strict=True)
    prediction = torch.cat([embed(*block).float().cpu() for block in blocks])
    if not prediction.isfinite().all():
        raise CSDiffError(
            f"{card.path}: expected finite predictions, found NaN or infinity; the adapter has diverged, train it "
            "again."
        )
    return prediction
