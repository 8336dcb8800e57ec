"""The models behind the page: loaded once, shared by everyone, changed by no one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from csdiff.adapters.linear import LinearAdapter
from csdiff.app.config import AppConfig
from csdiff.app.press import Progress, Report
from csdiff.devices import choose_device
from csdiff.embeddings.fingerprint import compare_encoders
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, DecoderSource, find_models
from csdiff.pipelines.decoding import load_decoder
from csdiff.pipelines.embedding import PromptEmbedder
from csdiff.resources import assets_dir

logger = logging.getLogger(__name__)

RAW_TEXT, SHIPPED = "none", "shipped"
# Enough for a ridge map of any width of CLIP, and a second's work.
_RIDGE_ROWS, _BLOCK = 1 << 17, 4096


class Models:
    """Adapters with their encoders, decoders and ridge maps, by what they were loaded from; two of each are kept.

    Args:
        config: device, number format and offloading.
        folder: where images are written that are drawn with these models.
    """

    def __init__(self, config: AppConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = choose_device(config.device)
        self._lock, self._kept = threading.Lock(), {}

    @contextmanager
    def turn(self, report: Report) -> Iterator[None]:
        """Waits for whoever uses the models: a pipeline holds the state of the drawing that goes on."""
        while not self._lock.acquire(timeout=0.5):
            report(Progress("Loading the models"))
        try:
            yield
        finally:
            self._lock.release()

    def warm_up(self) -> None:
        """Loads what the page starts with, while its reader still reads."""
        try:
            with self.turn(print):
                card, source = find_models(self.options())
                self.embedder(card, source)
                self.decoder(source)
        except Exception:
            # whoever draws is told the reason
            logger.debug("The models could not be loaded ahead", exc_info=True)

    def options(self, adapter: str | None = None, decoder: str | None = None, **settings: Any) -> GenerateConfig:
        """What was chosen on the page as options of `csdiff generate`: the page's own where a field is empty."""
        adapter = (adapter or "").strip() or self.config.adapter
        return GenerateConfig(
            adapter=None if adapter == SHIPPED else adapter,
            decoder=(decoder or "").strip() or self.config.decoder,
            device=self.config.device,
            dtype=self.config.dtype,
            **settings,
        )

    def embedder(self, card: AdapterCard | None, source: DecoderSource) -> PromptEmbedder:
        """Text encoder and adapter."""
        dtype = source.dtype(self.config.dtype, self.device)
        return self._keep("embedder", (_state(card), source), lambda: PromptEmbedder(card, source, self.device, dtype))

    def decoder(self, source: DecoderSource):
        """The decoder of `csdiff.pipelines.decoding`."""
        options = (self.device, source.dtype(self.config.dtype, self.device), self.config.offload, False)
        return self._keep("decoder", source, lambda: load_decoder(source, *options))

    def ridge(self, card: AdapterCard | None, source: DecoderSource) -> LinearAdapter:
        """The ridge map between the encoders of an adapter: the shipped one, or one fitted to its training store.

        Raises:
            CSDiffError: that store is not on this machine.
        """
        return self._keep("ridge", (_state(card), source), lambda: _ridge(card, source).to(self.device))

    def _keep(self, kind: str, key: Any, load: Callable[[], Any]) -> Any:
        """The two last used of a kind, oldest first."""
        kept = self._kept.setdefault(kind, [])
        found = next((entry for entry in kept if entry[0] == key), None)
        if found is not None:
            kept.remove(found)
        # before a third is loaded, so that there is room
        del kept[:-1]
        kept.append(found or (key, load()))
        return kept[-1][1]


def _state(card: AdapterCard | None) -> tuple | None:
    """An adapter as it is now: one that is trained again in the same folder is another one."""
    if card is None:
        return None
    files = sorted(file for file in card.path.iterdir() if file.suffix in (".json", ".safetensors"))
    return (card.path, *((file.name, file.stat().st_mtime_ns) for file in files))


def _ridge(card: AdapterCard | None, source: DecoderSource) -> LinearAdapter:
    shipped = LinearAdapter.from_pretrained(assets_dir() / "ridge").eval()
    metadata = card.metadata if card else {}
    for side in ("text", "image"):
        known = metadata.get(f"{side}_encoder") or source.encoder(side)
        if compare_encoders(shipped.metadata.get(f"{side}_encoder"), known, side).verdict != "same":
            break
    else:
        return shipped
    train = (metadata.get("data") or {}).get("train") or ""
    if not train or not (Path(train) / "text_emb").is_dir():
        raise CSDiffError("No ridge map: the embedding store that the adapter was trained on is not on this machine.")
    store = EmbeddingStore.open(train)
    blocks = max(1, min(len(store), _RIDGE_ROWS) // _BLOCK)
    # evenly spread over a store that has more rows than are needed
    starts = np.unique(np.linspace(0, max(0, len(store) - _BLOCK), blocks).astype(int))
    rows = (range(start, min(start + _BLOCK, len(store))) for start in starts)
    return LinearAdapter.fit((store.read(block, ["text_embeds", "image_embeds"]) for block in rows), "ridge").eval()
