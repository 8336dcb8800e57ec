"""The models behind the page: loaded once, shared by everyone, changed by no one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
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
from csdiff.pipelines.decoding import Decoder, load_decoder
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
        self._line, self._kept, self.pace = [], {}, ""

    @contextmanager
    def turn(self, report: Report) -> Iterator[None]:
        """Waits for those who came before: a pipeline holds the state of the drawing that goes on.

        Whoever has the turn tells them in `pace` how it goes; a CSDiffError where too many wait.
        """
        if len(self._line) > self.config.max_waiting:
            raise CSDiffError(f"{self.config.max_waiting} presses of the button wait already; try again later.")
        me = object()
        self._line.append(me)
        try:
            while before := self._line.index(me):
                report(Progress(f"Waiting: {before} before you{self.pace}"))
                time.sleep(0.2)
            self.pace = ""
            yield
        finally:
            self._line.remove(me)

    def warm_up(self) -> None:
        """Loads what the page starts with, while its reader still reads."""
        try:
            with self.turn(lambda _: None):
                self.pace = "; the models are being loaded"
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
            offload=self.config.offload,
            progress=False,
            **settings,
        )

    def embedder(self, card: AdapterCard | None, source: DecoderSource) -> PromptEmbedder:
        """Text encoder and adapter."""
        options, key = self.options(), (_state(card), source)
        return self._keep("embedder", key, lambda: PromptEmbedder(card, source, options, self.device))

    def decoder(self, source: DecoderSource) -> Decoder:
        """The decoder, loaded."""
        return self._keep("decoder", source, lambda: load_decoder(source, self.options(), self.device))

    def ridge(self, card: AdapterCard | None, source: DecoderSource) -> tuple[LinearAdapter, str]:
        """The ridge map of `fitted_maps`, and what it was fitted to; a CSDiffError where there is none."""
        known = {"text_encoder": source.text_encoder, "image_encoder": source.image_encoder}
        known |= {name: record for name, record in (card.metadata if card else {}).items() if record}
        maps, fitted_to = self._keep("maps", (_state(card), source), lambda: fitted_maps(card, known))
        if not maps:
            raise CSDiffError("No ridge map: the embedding store of the adapter's training is not on this machine.")
        return maps["ridge"].to(self.device), fitted_to

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


def fitted_maps(card: AdapterCard | None, metadata: Mapping[str, Any]) -> tuple[dict[str, LinearAdapter], str]:
    """Mean shift and ridge fitted to the training store of an adapter, and its name, if it is on this machine.

    Else, where `text_encoder` and `image_encoder` in `metadata` are the shipped ones, the shipped ridge map.
    """
    if card and (train := training_store(card)):
        pairs = read_pairs(train, EmbeddingStore.open(train), TRAIN_ROWS)
        methods = ("mean_shift", "ridge") if pairs.text.shape[1] == pairs.image.shape[1] else ("ridge",)
        data = [(pairs.text, pairs.image)]
        return {method: LinearAdapter.fit(data, method).eval() for method in methods}, Path(train).name
    shipped = LinearAdapter.from_pretrained(assets_dir() / "ridge").eval()
    sides = [(side, f"{side}_encoder") for side in ("text", "image")]
    found = [compare_encoders(shipped.metadata.get(name), metadata.get(name), side) for side, name in sides]
    return {"ridge": shipped} if all(one.verdict == "same" for one in found) else {}, "the shipped training images"
