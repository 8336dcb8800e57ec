"""Which encoders are in the loop, which columns are read, and whether that fits the data."""

import inspect
from dataclasses import dataclass

import torch

from csdiff.adapters.registry import ADAPTERS
from csdiff.embeddings.encoders import encoder_files, load_image_encoder, load_text_encoder
from csdiff.embeddings.fingerprint import check_same_encoder, weights_sha256
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.embeddings.text_encoder import TextEncoder
from csdiff.embeddings.tokenizer import load_caption_tokenizer
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.inputs import Inputs
from csdiff.training.pictures import Pictures
from csdiff.training.sources import Sources
from csdiff.training.task import Embedder


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


def caches_states(config: TrainConfig) -> bool:
    """Whether token states are to be kept when a dataset is embedded."""
    return reads_states(config) and config.data.text != "online"


@dataclass
class TextSide:
    """How text reaches the adapter.

    Attributes:
        states: Token states are read.
        online: Captions are encoded at every step.
        encoder: Frozen text encoder, where it is in the loop or its projection is needed.
        encoder_id: Text encoder by name, where the adapter lives inside it.
        shape: Tokens and width of the token states, where there are such.
    """

    states: bool
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


def open_text_side(config: TrainConfig, sources: Sources, device: torch.device) -> TextSide:
    """Decide between cached and online text, and load the encoder that needs.

    Raises:
        CSDiffError: a combination that cannot be: an adapter inside the text encoder on cached text, token states that
            are neither cached nor encoded, captions that are not there, another encoder than the store's.
    """
    store, inside = sources.store, bool(ADAPTERS[config.adapter].uses_input_ids)
    states = reads_states(config)
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
    name = encoder_id(config, sources, "text") if online or wants_tokens(config) else None
    if online and not has_captions(store):
        raise CSDiffError(
            f"--adapter {config.adapter} encodes captions at every step, and {store.path} has no captions: expected "
            "the column caption in metadata/*.parquet."
        )
    encoder = None
    if name is not None:
        found = {"id": name, "weights_sha256": weights_sha256(encoder_files(name, "text").model, "text")}
        if not inside:
            encoder = load_text_encoder(name, device)
            found = encoder.describe()
        check_same_encoder(sources.fingerprint.get("text_encoder"), found, "text", str(store.path), name)
    shape = None
    if states:
        shape = (encoder.max_length, encoder.states_dim) if online else _states_shape(store)
    return TextSide(states, online, encoder, name if inside else None, shape)


def build_inputs(
    config: TrainConfig, sources: Sources, text: TextSide, embedder: Embedder, device: torch.device
) -> Inputs:
    """What is read and encoded at every step; gives the embedder its projection of tokens.

    Raises:
        CSDiffError: image tokens that are neither cached nor encoded.
    """
    tokenize = None if text.encoder_id is None else load_caption_tokenizer(embedder.adapter.config.text_encoder)
    image_encoder = pictures = None
    image_keys: tuple[str, ...] = ("image_embeds",)
    if wants_tokens(config):
        image_encoder, pictures = _image_tokens(config, sources, device)
        image_keys = ("image_embeds",) if pictures else ("image_embeds", "image_tokens")
        if text.encoder is not None:
            embedder.project_text_with(text.encoder.project)
        else:
            embedder.project_text_with(embedder.adapter.text_encoder.text_projection.forward)
    text_keys = ("text_embeds", "text_states", "text_mask") if text.states and not text.online else ("text_embeds",)
    encoder = text.encoder if text.online and tokenize is None else None
    inputs = Inputs(device, text_keys, image_keys, encoder, tokenize, image_encoder, pictures)
    for group, name in {"pairs": "validation", "unpaired_text": "unpaired_text"}.items():
        pairs = getattr(sources, name)
        if pairs is not None:
            _check_columns(inputs, group, name, pairs.store)
    return inputs


def _check_columns(inputs: Inputs, group: str, name: str, store: EmbeddingStore) -> None:
    """Refuse a second store that lacks what the first one has."""
    # Held-out rows are measured on pooled embeddings: tokens are for the objective.
    missing = [key for key in inputs.keys[group] if key not in store.keys and key != "image_tokens"]
    if inputs.captions and not has_captions(store):
        missing.append("captions")
    if missing:
        raise CSDiffError(
            f"--data.{name} {store.path} has no {missing[0]}, which the run reads: embed it like the training data."
        )


def has_captions(store: EmbeddingStore) -> bool:
    """Whether a store knows its captions."""
    return store.metadata is not None and "caption" in store.metadata.names


def check_named_encoders(config: TrainConfig, sources: Sources) -> None:
    """Refuse encoders that are named in the configuration and are not those of the store, needed or not."""
    for side in ("text", "image"):
        name, stated = getattr(config.data, f"{side}_encoder"), sources.fingerprint.get(f"{side}_encoder")
        if name is not None and stated is not None and is_store(config.data.train):
            found = {"id": name, "weights_sha256": weights_sha256(encoder_files(name, side).model, side)}
            check_same_encoder(stated, found, side, str(sources.store.path), name)


def encoder_id(config: TrainConfig, sources: Sources, side: str) -> str:
    """An encoder by the configuration, else the one the store was made with."""
    given = getattr(config.data, f"{side}_encoder")
    name = given or (sources.fingerprint.get(f"{side}_encoder") or {}).get("id")
    if name is None:
        raise CSDiffError(
            f"{sources.store.path} does not say which {side} encoder made it, and adapter or objective need it: name "
            f"it with --data.{side}_encoder."
        )
    return name


def _image_tokens(config: TrainConfig, sources: Sources, device: torch.device) -> tuple[ImageEncoder, Pictures | None]:
    """The image encoder that projects tokens, and the pictures it is to see where tokens are not cached."""
    store, data = sources.store, config.data
    if config.image_adapter is not None:
        raise CSDiffError(
            "--image_adapter maps pooled embeddings only: leave it or --objective_options.token_weight out."
        )
    name = encoder_id(config, sources, "image")
    cached = "image_tokens" in store.keys
    dataset = data.images or (None if is_store(data.train) else data.train)
    if not cached and (data.image == "cached" or dataset is None):
        raise CSDiffError(
            f"--objective_options.token_weight: the token term needs image tokens, and {store.path} has none: embed "
            "again with --image_tokens true, or name the dataset with the pictures with --data.images."
        )
    encoder = load_image_encoder(name, device)
    check_same_encoder(sources.fingerprint.get("image_encoder"), encoder.describe(), "image", str(store.path), name)
    return encoder, None if cached and data.image != "online" else Pictures(dataset)


def _states_shape(store: EmbeddingStore) -> tuple[int, int]:
    return tuple(store.read([0], ["text_states"])["text_states"].shape[1:])
