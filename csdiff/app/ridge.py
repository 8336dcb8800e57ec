"""The ridge map that stands beside an adapter: what a linear map makes of the same pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings.fingerprint import compare_encoders
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import DecoderSource
from csdiff.pipelines.pairing import AdapterCard
from csdiff.resources import assets_dir

# Enough for any width of CLIP, and a second's work.
MOST_ROWS = 1 << 17
BLOCK = 4096


def fit_ridge(card: AdapterCard | None, source: DecoderSource) -> LinearAdapter:
    """The shipped map for the shipped encoders, else one fitted to the store the adapter was trained on.

    Raises:
        CSDiffError: that store is not on this machine.
    """
    shipped = assets_dir() / "ridge"
    if shipped.is_dir():
        ridge = LinearAdapter.from_pretrained(shipped).eval()
        if all(
            compare_encoders(ridge.metadata.get(f"{side}_encoder"), _encoder(card, source, side), side).verdict
            == "same"
            for side in ("text", "image")
        ):
            return ridge
    train = ((card.metadata.get("data") or {}).get("train") if card else None) or ""
    if not train or not (Path(train) / "text_emb").is_dir():
        raise CSDiffError("No ridge map: the embedding store that the adapter was trained on is not on this machine.")
    return LinearAdapter.fit(_pairs(EmbeddingStore.open(train)), "ridge").eval()


def _pairs(store: EmbeddingStore) -> Iterator[dict]:
    """Blocks of rows, evenly spread over a store that has more than are needed."""
    blocks = max(1, len(store) // BLOCK)
    starts = np.unique(np.linspace(0, max(0, len(store) - BLOCK), min(blocks, MOST_ROWS // BLOCK)).astype(int))
    for start in starts:
        yield store.read(range(start, min(start + BLOCK, len(store))), ["text_embeds", "image_embeds"])


def _encoder(card: AdapterCard | None, source: DecoderSource, side: str) -> dict | None:
    return (card.metadata.get(f"{side}_encoder") if card else None) or source.encoder(side)
