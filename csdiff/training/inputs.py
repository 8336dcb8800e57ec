"""From rows of a store to what the embedder takes: on its device, with the frozen encoders that are in the loop."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from csdiff.adapters.registry import ADAPTERS
from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.embeddings.encoders import encoder_files
from csdiff.embeddings.fingerprint import check_same_encoder, weights_sha256
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.loader import StoreBatches
from csdiff.embeddings.store import EmbeddingStore
from csdiff.embeddings.text_encoder import CaptionTokenizer, TextEncoder, load_caption_tokenizer
from csdiff.errors import CSDiffError
from csdiff.kinds import is_store
from csdiff.training.config import TrainConfig
from csdiff.training.data import Pairs, TrainingData, reads_states, wants_tokens

Rows = dict[str, dict]
"""Groups of rows (`pairs`, `unpaired_text`, ...), each a dict of tensors or lists with one entry a row."""

_CHUNK = 256


@dataclass
class Inputs:
    device: str | torch.device  # of the embedder
    # Columns that are read, by group of rows.
    keys: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "pairs": ("text_embeds", "image_embeds"),
            "unpaired_text": ("text_embeds",),
            "unpaired_image": ("image_embeds",),
        }
    )
    # A frozen text encoder in the loop, or the name of the one that the adapter lives in, and its tokenizer.
    text_encoder: TextEncoder | None = None
    inside: str | None = None
    tokenize: CaptionTokenizer | None = None
    # With a token-level term: the projections of both encoders, and the images where their tokens are not cached.
    project_text: Callable[[Tensor], Tensor] | None = None
    image_encoder: ImageEncoder | None = None
    images: "DatasetImages | None" = None

    @property
    def captions(self) -> bool:
        return self.text_encoder is not None or self.tokenize is not None

    def feed(
        self, groups: dict[str, Pairs], sizes: dict[str, int], seed: int, place: tuple[int, int, int] = (0, 1, 0)
    ) -> Iterator[Rows]:
        """Endless batches, prepared: this process's part (`place`: rank, processes, first step) of groups of rows."""
        loaders = []
        for name, pairs in groups.items():
            captions = self.captions and name != "unpaired_image"
            data = {"keys": self.keys[name], "captions": captions, "rows": pairs.rows, "groups": pairs.groups}
            loaders.append(StoreBatches(pairs.store, sizes[name], seed, *place, **data))
        for parts in zip(*loaders, strict=True):
            batch = dict(zip(groups, parts, strict=True))
            yield {name: self._rows(rows, tokens=name == "pairs") for name, rows in batch.items()}

    def read(self, pairs: Pairs, block: int = 1024) -> list[dict]:
        """All rows of a set of pairs, prepared, in blocks; without tokens, which only the objective looks at."""
        blocks = []
        keys = tuple(key for key in self.keys["pairs"] if key != "image_tokens")
        for start in range(0, len(pairs), block):
            rows = pairs.rows[start : start + block]
            raw: dict = dict(pairs.store.read(rows, keys))
            if self.captions:
                raw["captions"] = pairs.store.captions(rows)
            blocks.append(self._rows(raw, tokens=False))
        return blocks

    @torch.no_grad()
    def _rows(self, rows: dict, tokens: bool) -> dict:
        """Rows on the device, with what is not cached encoded."""
        ready: dict[str, Tensor] = {
            name: value.to(self.device, non_blocking=True)
            for name, value in rows.items()
            if name not in ("index", "captions")
        }
        if "captions" in rows and self.tokenize is not None:
            ready["input_ids"], ready["text_mask"] = (t.to(self.device) for t in self.tokenize(rows["captions"]))
        if "captions" in rows and self.text_encoder is not None:
            parts = [self.text_encoder.encode(captions) for captions in _chunks(rows["captions"])]
            ready["text_embeds"] = torch.cat([part.embeds for part in parts]).float()
            ready["text_states"] = torch.cat([part.states for part in parts]).float()
            ready["text_mask"] = torch.cat([part.mask for part in parts])
        if tokens and self.image_encoder is not None:
            if self.images is None:
                states = _chunks(ready["image_tokens"])
            else:
                states = (self.image_encoder.encode(self.images(part)).tokens for part in _chunks(rows["index"]))
            ready["image_tokens"] = torch.cat([self.image_encoder.project(part).float() for part in states])
        return ready


def _chunks(rows) -> Iterator:
    """Encoders see so many rows at a time, whatever the batch."""
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


class DatasetImages:
    """The encoded images of the dataset that a store was made from, decoded when they are asked for.

    Files stay on the disk; images inside archives and tables are held in memory as they are (about 4 KB each for small
    icons, 100 KB for photographs): for data larger than memory, cache image tokens in the store instead.
    """

    def __init__(self, path: str, store: EmbeddingStore, allow_outside: bool = False):
        self.path, self.store = path, store
        source = open_source(path, allow_outside=allow_outside)
        if not source.has_images:
            raise CSDiffError(f"{path} has no images, and an image encoder is to see them at every step.")
        self._images: dict[str, bytes | Path] = {
            item.id: item.image for item in source if isinstance(item, Item) and item.image is not None
        }

    def __call__(self, rows: Tensor) -> list[Image]:
        """Images of rows of the store; CSDiffError if one is not in the dataset, or cannot be decoded any more."""
        try:
            return [decode_image(self._images[name]) for name in self.store.image_ids(rows)]
        except (KeyError, UnreadableImage) as error:
            raise CSDiffError(f"{self.path}: expected the images of the store, unchanged ({error}).") from error


def open_inputs(config: TrainConfig, data: TrainingData, device: torch.device) -> Inputs:
    """Decide between cached and online text and images, by adapter, objective and store, and load the encoders.

    Raises:
        CSDiffError: something to be read is neither cached nor can be encoded, or an encoder is not the store's.
    """
    inputs = Inputs(device)
    _open_text(inputs, config, data)
    if wants_tokens(config):
        _open_image_tokens(inputs, config, data)
    elif config.data.image_encoder is not None:
        _encoder(config, data, "image")
    unpaired = data.groups.get("unpaired_text")
    for name, group, pairs in (("validation", "pairs", data.validation), ("unpaired_text", "unpaired_text", unpaired)):
        if pairs is None:
            continue
        # Held-out rows are measured on pooled embeddings: tokens are for the objective.
        missing = [key for key in inputs.keys[group] if key not in (*pairs.store.keys, "image_tokens")]
        if inputs.captions and not _has_captions(pairs.store):
            missing.append("captions")
        if missing:
            raise CSDiffError(f"--data.{name} {pairs.store.path} has no {missing[0]}: embed it as the training data.")
    return inputs


def _open_text(inputs: Inputs, config: TrainConfig, data: TrainingData) -> None:
    store, inside, states = data.store, bool(ADAPTERS[config.adapter].uses_input_ids), reads_states(config)
    cached = not inside and (not states or "text_states" in store.keys)
    if config.data.text == "cached" and not cached:
        lack = "changes the text encoder itself" if inside else f"needs token states, and {store.path} has none"
        raise CSDiffError(
            f"--adapter {config.adapter} with this objective {lack}, so it cannot be trained on cached text: set "
            "--data.text online."
        )
    online = config.data.text == "online" or not cached
    if online and not _has_captions(store):
        raise CSDiffError(
            f"--adapter {config.adapter} encodes captions at every step: expected the column caption in "
            f"{store.path}/metadata/*.parquet, found none."
        )
    if inside:
        inputs.inside = _encoder(config, data, "text")
        inputs.tokenize = load_caption_tokenizer(config.adapter_options.get("text_encoder", inputs.inside))
    elif online or wants_tokens(config):
        encoder = _encoder(config, data, "text", inputs.device)
        inputs.project_text = encoder.project
        if online:
            inputs.text_encoder = encoder
            if config.data.text == "auto":
                warnings.warn(
                    f"Steps are slow: {store.path} has no token states, so {encoder.id} encodes "
                    f"{config.batch_size:,} captions at every step. Embed once with --text_states true instead, or "
                    "choose an adapter for pooled text, as mlp.",
                    stacklevel=2,
                )
    elif config.data.text_encoder is not None:
        _encoder(config, data, "text")
    if states and not online:
        for group in ("pairs", "unpaired_text"):
            inputs.keys[group] += ("text_states", "text_mask")


def _open_image_tokens(inputs: Inputs, config: TrainConfig, data: TrainingData) -> None:
    store = data.store
    if config.image_adapter is not None:
        raise CSDiffError("--image_adapter maps pooled embeddings only: leave it or the token_weight out.")
    cached = "image_tokens" in store.keys
    dataset = config.data.images or (None if is_store(config.data.train) else config.data.train)
    if not cached and (config.data.image == "cached" or dataset is None):
        raise CSDiffError(
            f"--objective_options.token_weight needs image tokens, and {store.path} has none: embed again with "
            "--image_tokens true, or name the dataset with the images with --data.images."
        )
    inputs.image_encoder = _encoder(config, data, "image", inputs.device)
    if cached and config.data.image != "online":
        inputs.keys["pairs"] += ("image_tokens",)
    else:
        inputs.images = DatasetImages(dataset, store, config.data.allow_outside)


def _encoder(config: TrainConfig, data: TrainingData, side: str, device: torch.device | None = None) -> Any:
    """The encoder of the configuration, else the one the store was made with: loaded to a device, or only its name.

    Raises:
        CSDiffError: it is not the one the store was made with, or neither of them names one.
    """
    known = data.encoder(side)
    name = encoder = getattr(config.data, f"{side}_encoder") or known.get("id")
    if name is None:
        raise CSDiffError(f"{data.store.path} does not say which {side} encoder made it: give --data.{side}_encoder.")
    if device is not None:
        encoder = (load_text_encoder if side == "text" else load_image_encoder)(name, device)
    if known:
        if device is None:
            found = {"id": name, "weights_sha256": weights_sha256(encoder_files(name, side).model, side)}
        else:
            found = encoder.describe()
        check_same_encoder(known, found, side, str(data.store.path), name)
    return encoder


def _has_captions(store: EmbeddingStore) -> bool:
    return store.metadata is not None and "caption" in store.metadata.names
