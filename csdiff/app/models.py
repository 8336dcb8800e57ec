"""The models behind the page: loaded once, shared by everyone, changed by no one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdiff.adapters.linear import LinearAdapter
from csdiff.app.config import AppConfig
from csdiff.app.work import Line
from csdiff.devices import choose_device
from csdiff.embeddings import load_image_encoder
from csdiff.embeddings.fingerprint import compare_encoders
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import AdapterCard, DecoderSource, check_pairing, read_adapter_card, resolve_decoder
from csdiff.pipelines.decoding import load_decoder
from csdiff.pipelines.embedding import PromptEmbedder
from csdiff.resources import assets_dir

logger = logging.getLogger(__name__)

RAW_TEXT = "none"
SHIPPED = "shipped"
# Enough for a ridge map of any width of CLIP, and a second's work.
_RIDGE_ROWS = 1 << 17


class Models:
    """Adapters with their encoders, decoders and ridge maps, by what they were loaded from.

    Two of each are kept. A pipeline holds the state of the drawing that goes on, so that drawings take turns: whoever
    uses the models holds a turn of `line`.

    Args:
        config: device, number format and offloading.
        folder: where images are written that are drawn with these models.
    """

    def __init__(self, config: AppConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = choose_device(config.device)
        self.line = Line(config.max_waiting)
        self._kept: OrderedDict[tuple, Any] = OrderedDict()

    def dtype(self, source: DecoderSource) -> torch.dtype:
        """The number format of a decoder and its encoders, as `csdiff generate` chooses it."""
        return source.dtype(self.config.dtype, self.device)

    def warm_up(self) -> None:
        """Loads what the page starts with, while its reader still reads."""
        try:
            with self.line.turn(lambda _: None):
                card, source = self.find(None, None)
                self.embedder(card, source)
                self.decoder(source)
        except Exception:
            # whoever draws is told the reason
            logger.debug("The models could not be loaded ahead", exc_info=True)

    def adapter_option(self, chosen: str | None) -> str | None:
        """What was chosen on the page as an option of `csdiff generate`: the page's own adapter where it is empty."""
        chosen = (chosen or "").strip() or self.config.adapter
        return None if chosen == SHIPPED else chosen

    def decoder_option(self, chosen: str | None) -> str:
        """The same for the decoder."""
        return (chosen or "").strip() or self.config.decoder

    def find(self, adapter: str | None, decoder: str | None) -> tuple[AdapterCard | None, DecoderSource]:
        """The adapter's card (None for raw text) and the decoder, checked to fit; reads no weights.

        Raises:
            CSDiffError: nothing there, or the two do not fit.
        """
        source = resolve_decoder(self.decoder_option(decoder))
        adapter = self.adapter_option(adapter)
        if adapter == RAW_TEXT:
            return None, source
        card = read_adapter_card(adapter or assets_dir() / "adapter")
        check_pairing(card, source)
        return card, source

    def embedder(self, card: AdapterCard | None, source: DecoderSource) -> PromptEmbedder:
        """Text encoder and adapter."""
        key = ("embedder", _state(card), source.source)
        return self._keep(key, lambda: PromptEmbedder(card, source, self.device, self.dtype(source)))

    def decoder(self, source: DecoderSource):
        """The decoder of `csdiff.pipelines.decoding`."""
        return self._keep(
            ("decoder", source.source, str(source.ip_adapter)),
            lambda: load_decoder(source, self.device, self.dtype(source), self.config.offload, progress=False),
        )

    def ridge(self, card: AdapterCard | None, source: DecoderSource) -> LinearAdapter:
        """The ridge map between the encoders of an adapter: the shipped one, or one fitted to its training store.

        Raises:
            CSDiffError: that store is not on this machine.
        """
        return self._keep(("ridge", _state(card), source.source), lambda: _ridge(card, source).to(self.device))

    @torch.no_grad()
    def image_embeds(self, embedder: PromptEmbedder, image) -> Tensor:
        """An image as a raw image embedding `(1, D)`.

        Raises:
            CSDiffError: neither decoder nor adapter names the image encoder.
        """
        known = embedder.image_encoder or {}
        if not known.get("id"):
            raise CSDiffError("Neither the decoder nor the adapter names an image encoder, which an upload needs.")
        encoder = self._keep(
            ("image encoder", known["id"], known.get("revision")),
            lambda: load_image_encoder(known["id"], self.device, embedder.dtype, revision=known.get("revision")),
        )
        return encoder.encode([image]).embeds.to(embedder.dtype)

    def _keep(self, key: tuple, load: Callable[[], Any]) -> Any:
        if key not in self._kept:
            alike = [other for other in self._kept if other[0] == key[0]]
            if len(alike) >= 2:
                del self._kept[alike[0]]
            self._kept[key] = load()
        self._kept.move_to_end(key)
        return self._kept[key]


def _state(card: AdapterCard | None) -> tuple | None:
    """An adapter as it is now: one that is trained again in the same folder is another one."""
    if card is None:
        return None
    files = sorted(file for file in Path(card.path).iterdir() if file.suffix in (".json", ".safetensors"))
    return (str(card.path), *((file.name, file.stat().st_mtime_ns) for file in files))


def _ridge(card: AdapterCard | None, source: DecoderSource) -> LinearAdapter:
    def encoder(side: str) -> dict | None:
        return (card.metadata.get(f"{side}_encoder") if card else None) or source.encoder(side)

    shipped = LinearAdapter.from_pretrained(assets_dir() / "ridge").eval()
    verdicts = [
        compare_encoders(shipped.metadata.get(f"{side}_encoder"), encoder(side), side).verdict
        for side in ("text", "image")
    ]
    if verdicts == ["same", "same"]:
        return shipped
    train = ((card.metadata.get("data") or {}).get("train") if card else None) or ""
    if not train or not (Path(train) / "text_emb").is_dir():
        raise CSDiffError("No ridge map: the embedding store that the adapter was trained on is not on this machine.")
    return LinearAdapter.fit(_pairs(EmbeddingStore.open(train)), "ridge").eval()


def _pairs(store: EmbeddingStore, block: int = 4096) -> Iterator[dict]:
    """Blocks of rows, evenly spread over a store that has more than are needed."""
    blocks = max(1, min(len(store), _RIDGE_ROWS) // block)
    for start in np.unique(np.linspace(0, max(0, len(store) - block), blocks).astype(int)):
        yield store.read(range(start, min(start + block, len(store))), ["text_embeds", "image_embeds"])
