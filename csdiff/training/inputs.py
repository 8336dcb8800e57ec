"""From rows of a store to what the embedder takes: on its device, with the frozen encoders that are in the loop.

Which encoders those are follows from adapter, objective and store: `open_text_side`, `open_inputs`.
"""

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from csdiff.adapters.registry import ADAPTERS
from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.embeddings.encoders import encoder_files, load_image_encoder, load_text_encoder
from csdiff.embeddings.fingerprint import check_same_encoder, weights_sha256
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.loader import StoreBatches
from csdiff.embeddings.store import EmbeddingStore
from csdiff.embeddings.text_encoder import TextEncoder
from csdiff.embeddings.tokenizer import CaptionTokenizer, load_caption_tokenizer
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.data import Pairs, TrainingData
from csdiff.training.gradient_cache import Rows
from csdiff.training.task import Embedder

_CHUNK = 256


class Inputs:
    """Prepares batches.

    Args:
        device: Of the embedder.
        text_keys: Columns read of the text side.
        image_keys: Columns read of the image side.
        text_encoder: Frozen text encoder in the loop, or None.
        tokenize: For an adapter inside the text encoder, or None.
        image_encoder: Frozen image encoder whose projection maps image tokens, or None without a token-level term.
        images: Images by identity for that encoder in the loop, or None where its tokens are cached.
    """

    def __init__(
        self,
        device: str | torch.device,
        text_keys: tuple[str, ...] = ("text_embeds",),
        image_keys: tuple[str, ...] = ("image_embeds",),
        text_encoder: TextEncoder | None = None,
        tokenize: CaptionTokenizer | None = None,
        image_encoder: ImageEncoder | None = None,
        images: "DatasetImages | None" = None,
    ):
        self.device = torch.device(device)
        self.keys = {
            "pairs": (*text_keys, *image_keys),
            "unpaired_text": text_keys,
            "unpaired_image": ("image_embeds",),
        }
        self.text_encoder, self.tokenize = text_encoder, tokenize
        self.image_encoder, self.images = image_encoder, images
        self.captions = text_encoder is not None or tokenize is not None

    def batches(
        self, group: str, pairs: Pairs, batch_size: int, seed: int, rank: int, world_size: int, step: int
    ) -> Iterator[dict]:
        """Endless batches of one group, this process's part of them, from a step on."""
        loader = StoreBatches(
            pairs.store,
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start_step=step,
            keys=self.keys[group],
            captions=self.captions and group != "unpaired_image",
            rows=pairs.rows,
            groups=pairs.groups,
        )
        for batch in loader:
            if group == "pairs" and self.images is not None:
                batch["image_ids"] = pairs.store.image_ids(batch["index"])
            yield batch

    def prepare(self, batch: Rows) -> Rows:
        """Move every group to the device and encode what is not cached."""
        return {group: self._rows(rows, tokens=group == "pairs") for group, rows in batch.items()}

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

    def _rows(self, rows: dict, tokens: bool) -> dict:
        ready: dict[str, Tensor] = {
            name: value.to(self.device, non_blocking=True)
            for name, value in rows.items()
            if isinstance(value, Tensor) and name != "index"
        }
        if "captions" in rows and self.tokenize is not None:
            ready["input_ids"], ready["text_mask"] = (t.to(self.device) for t in self.tokenize(rows["captions"]))
        if "captions" in rows and self.text_encoder is not None:
            ready |= self._encode_text(rows["captions"])
        if tokens and self.image_encoder is not None:
            ready["image_tokens"] = self._image_tokens(rows, ready)
        return ready

    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        parts = [self.text_encoder.encode(captions[i : i + _CHUNK]) for i in range(0, len(captions), _CHUNK)]
        return {
            "text_embeds": torch.cat([p.embeds for p in parts]).float(),
            "text_states": torch.cat([p.states for p in parts]).float(),
            "text_mask": torch.cat([p.mask for p in parts]),
        }

    @torch.no_grad()
    def _image_tokens(self, rows: dict, ready: dict) -> Tensor:
        if self.images is None:
            states = ready["image_tokens"].split(_CHUNK)
        else:
            names = rows["image_ids"]
            chunks = (self.images(names[start : start + _CHUNK]) for start in range(0, len(names), _CHUNK))
            states = (self.image_encoder.encode(images).tokens for images in chunks)
        return torch.cat([self.image_encoder.project(part).float() for part in states])


class DatasetImages:
    """The encoded images of a dataset in memory, decoded when they are asked for.

    Files stay on the disk; images inside archives and tables are held as they are (about 4 KB each for small icons,
    100 KB for photographs): for data larger than memory, cache image tokens in the store instead.

    Args:
        path: Dataset in any form that `csdiff embed` reads.
        allow_outside: Read images that it names outside its folder.
    """

    def __init__(self, path: str, allow_outside: bool = False):
        self.path = path
        source = open_source(path, allow_outside=allow_outside)
        if not source.has_images:
            raise CSDiffError(f"{path} has no images, and an image encoder is to see them at every step.")
        self._images: dict[str, bytes | Path] = {
            item.id: item.image
            for unit in range(source.units(10_000))
            for item in source.read(unit, 10_000)
            if isinstance(item, Item) and item.image is not None
        }

    def __call__(self, identities: list[str]) -> list[Image]:
        """Images by `image_id`.

        Raises:
            CSDiffError: an image of the store is not in the dataset, or cannot be decoded any more.
        """
        try:
            return [decode_image(self._images[name]) for name in identities]
        except (KeyError, UnreadableImage) as error:
            raise CSDiffError(
                f"{self.path}: an image of the store cannot be read here ({error}): give the dataset that the store "
                "was made from, unchanged."
            ) from error


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


@dataclass
class TextSide:
    """How text reaches the adapter.

    Attributes:
        online: Captions are encoded at every step.
        encoder: Frozen text encoder, where it is in the loop or its projection is needed.
        encoder_id: Text encoder by name, where the adapter lives inside it.
        shape: Tokens and width of the token states that are read, or None.
    """

    online: bool
    encoder: TextEncoder | None
    encoder_id: str | None
    shape: tuple[int, int] | None

    def adapter_options(self, config: TrainConfig) -> dict:
        """Options of the adapter that the data decides."""
        accepted = inspect.signature(ADAPTERS[config.adapter].__init__).parameters
        options: dict = {}
        if self.encoder_id is not None:
            options["text_encoder"] = self.encoder_id
        if self.shape is not None:
            options |= {"num_embeddings": self.shape[0], "states_dim": self.shape[1]}
        return {name: value for name, value in options.items() if name in accepted}


def open_text_side(config: TrainConfig, data: TrainingData, device: torch.device) -> TextSide:
    """Decide between cached and online text, and load the encoder that needs.

    Raises:
        CSDiffError: a combination that cannot be: an adapter inside the text encoder on cached text, token states that
            are neither cached nor encoded, captions that are not there, another encoder than the store's.
    """
    store, inside, states = data.store, bool(ADAPTERS[config.adapter].uses_input_ids), reads_states(config)
    cached = not inside and (not states or "text_states" in store.keys)
    if config.data.text == "cached" and inside:
        raise CSDiffError(
            f"--adapter {config.adapter} changes the text encoder itself, so it cannot be trained on cached text: set "
            "--data.text online."
        )
    if config.data.text == "cached" and not cached:
        raise CSDiffError(
            f"--adapter {config.adapter} with this objective needs token states, and {store.path} has none: embed "
            "again with --text_states true, or set --data.text online."
        )
    online = config.data.text == "online" or not cached
    name = _encoder_id(config, data, "text") if online or wants_tokens(config) else None
    if online and not _has_captions(store):
        raise CSDiffError(
            f"--adapter {config.adapter} encodes captions at every step, and {store.path} has no captions: expected "
            "the column caption in metadata/*.parquet."
        )
    if online and not inside and config.data.text == "auto":
        warnings.warn(
            f"Steps are slow: {store.path} has no token states, so {name} encodes {config.batch_size:,} captions at "
            "every step, which takes many times as long as the adapter. Embed once with --text_states true instead, "
            "or choose an adapter for pooled text such as mlp.",
            stacklevel=2,
        )
    encoder = None
    if name is not None and not inside:
        encoder = load_text_encoder(name, device)
        check_same_encoder(data.encoder("text"), encoder.describe(), "text", str(store.path), name)
    elif name is not None:
        _check_named(data, "text", name)
    shape = None
    if states:
        example = None if online else store.read([0], ["text_states"])["text_states"]
        shape = (encoder.max_length, encoder.states_dim) if online else tuple(example.shape[1:])
    return TextSide(online, encoder, name if inside else None, shape)


def open_inputs(
    config: TrainConfig, data: TrainingData, text: TextSide, embedder: Embedder, device: torch.device
) -> Inputs:
    """What is read and encoded at every step; gives the embedder its projection of tokens.

    Raises:
        CSDiffError: image tokens that are neither cached nor encoded, a second store that lacks what is read.
    """
    tokenize = None if text.encoder_id is None else load_caption_tokenizer(embedder.adapter.config.text_encoder)
    image_encoder = images = None
    image_keys: tuple[str, ...] = ("image_embeds",)
    if wants_tokens(config):
        image_encoder, images = _open_image_tokens(config, data, device)
        image_keys = ("image_embeds",) if images else ("image_embeds", "image_tokens")
        if text.encoder is not None:
            embedder.project_text_with(text.encoder.project)
        else:
            embedder.project_text_with(embedder.adapter.text_encoder.text_projection.forward)
    cached_states = text.shape is not None and not text.online
    text_keys = ("text_embeds", "text_states", "text_mask") if cached_states else ("text_embeds",)
    encoder = text.encoder if text.online and tokenize is None else None
    inputs = Inputs(device, text_keys, image_keys, encoder, tokenize, image_encoder, images)
    for group, name in {"pairs": "validation", "unpaired_text": "unpaired_text"}.items():
        pairs = getattr(data, name)
        if pairs is None:
            continue
        # Held-out rows are measured on pooled embeddings: tokens are for the objective.
        missing = [key for key in inputs.keys[group] if key not in pairs.store.keys and key != "image_tokens"]
        if inputs.captions and not _has_captions(pairs.store):
            missing.append("captions")
        if missing:
            raise CSDiffError(
                f"--data.{name} {pairs.store.path} has no {missing[0]}, which the run reads: embed it like the "
                "training data."
            )
    return inputs


def check_named_encoders(config: TrainConfig, data: TrainingData) -> None:
    """Refuse encoders that are named in the configuration and are not those of the store, needed or not."""
    for side in ("text", "image"):
        name = getattr(config.data, f"{side}_encoder")
        if name is not None and data.encoder(side) and is_store(config.data.train):
            _check_named(data, side, name)


def _check_named(data: TrainingData, side: str, name: str) -> None:
    found = {"id": name, "weights_sha256": weights_sha256(encoder_files(name, side).model, side)}
    check_same_encoder(data.encoder(side), found, side, str(data.store.path), name)


def _encoder_id(config: TrainConfig, data: TrainingData, side: str) -> str:
    """An encoder by the configuration, else the one the store was made with."""
    name = getattr(config.data, f"{side}_encoder") or data.encoder(side).get("id")
    if name is None:
        raise CSDiffError(
            f"{data.store.path} does not say which {side} encoder made it, and adapter or objective need it: name "
            f"it with --data.{side}_encoder."
        )
    return name


def _has_captions(store: EmbeddingStore) -> bool:
    return store.metadata is not None and "caption" in store.metadata.names


def _open_image_tokens(
    config: TrainConfig, data: TrainingData, device: torch.device
) -> tuple[ImageEncoder, DatasetImages | None]:
    """The image encoder that projects tokens, and the images it is to see where tokens are not cached."""
    store = data.store
    if config.image_adapter is not None:
        raise CSDiffError(
            "--image_adapter maps pooled embeddings only: leave it or --objective_options.token_weight out."
        )
    name, cached = _encoder_id(config, data, "image"), "image_tokens" in store.keys
    dataset = config.data.images or (None if is_store(config.data.train) else config.data.train)
    if not cached and (config.data.image == "cached" or dataset is None):
        raise CSDiffError(
            f"--objective_options.token_weight: the token term needs image tokens, and {store.path} has none: embed "
            "again with --image_tokens true, or name the dataset with the images with --data.images."
        )
    encoder = load_image_encoder(name, device)
    check_same_encoder(data.encoder("image"), encoder.describe(), "image", str(store.path), name)
    if cached and config.data.image != "online":
        return encoder, None
    return encoder, DatasetImages(dataset, config.data.allow_outside)
