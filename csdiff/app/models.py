"""The models behind the page: loaded once, shared by everyone, changed by no one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csdiff.adapters.linear import LinearAdapter
from csdiff.app.config import AppConfig
from csdiff.app.press import Progress, Report
from csdiff.devices import choose_device
from csdiff.embeddings.fingerprint import compare_encoders
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.data import read_pairs, training_store
from csdiff.evaluation.evaluate import TRAIN_ROWS
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, DecoderSource, find_models
from csdiff.pipelines.decoding import load_decoder
from csdiff.pipelines.embedding import PromptEmbedder
from csdiff.resources import assets_dir

logger = logging.getLogger(__name__)

RAW_TEXT, SHIPPED = "none", "shipped"


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
    known = {side: metadata.get(f"{side}_encoder") or source.encoder(side) for side in ("text", "image")}
    found = [compare_encoders(shipped.metadata.get(f"{side}_encoder"), known[side], side) for side in known]
    if all(encoder.verdict == "same" for encoder in found):
        return shipped
    train = training_store(card) if card else None
    if train is None:
        raise CSDiffError("No ridge map: the embedding store that the adapter was trained on is not on this machine.")
    pairs = read_pairs(train, EmbeddingStore.open(train), TRAIN_ROWS)
    return LinearAdapter.fit(zip(pairs.text.split(8192), pairs.image.split(8192), strict=True)).eval()
