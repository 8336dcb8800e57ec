"""Which frozen encoders are in the loop and which columns are read: it follows from adapter, objective and store."""

import warnings

import torch

from csdiff.adapters.registry import ADAPTERS
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.embeddings.encoders import encoder_files
from csdiff.embeddings.fingerprint import check_same_encoder, weights_sha256
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.embeddings.tokenizer import load_caption_tokenizer
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.data import TrainingData, reads_states, wants_tokens
from csdiff.training.inputs import DatasetImages, Inputs


def open_inputs(config: TrainConfig, data: TrainingData, device: torch.device) -> Inputs:
    """Decide between cached and online text and images, and load the encoders that needs.

    Raises:
        CSDiffError: a combination that cannot be: an adapter inside the text encoder on cached text, token states or
            image tokens that are neither cached nor encoded, captions that are not there, another encoder than the
            store's, a second store that lacks what is read.
    """
    for side in ("text", "image"):
        name = getattr(config.data, f"{side}_encoder")
        if name is not None and is_store(config.data.train):
            _check_named(data, side, name)
    inputs = Inputs(device)
    _open_text(inputs, config, data)
    if wants_tokens(config):
        _open_image_tokens(inputs, config, data)
    unpaired = data.unpaired.get("unpaired_text")
    for name, group, pairs in (("validation", "pairs", data.validation), ("unpaired_text", "unpaired_text", unpaired)):
        if pairs is None:
            continue
        # Held-out rows are measured on pooled embeddings: tokens are for the objective.
        missing = [key for key in inputs.keys[group] if key not in (*pairs.store.keys, "image_tokens")]
        if inputs.captions and not _has_captions(pairs.store):
            missing.append("captions")
        if missing:
            raise CSDiffError(
                f"--data.{name} {pairs.store.path} has no {missing[0]}, which the run reads: embed it like the "
                "training data."
            )
    return inputs


def _open_text(inputs: Inputs, config: TrainConfig, data: TrainingData) -> None:
    store, inside, states = data.store, bool(ADAPTERS[config.adapter].uses_input_ids), reads_states(config)
    cached = not inside and (not states or "text_states" in store.keys)
    if config.data.text == "cached" and not cached:
        lack = "changes the text encoder itself" if inside else f"needs token states, and {store.path} has none"
        cure = "" if inside else ", or embed again with --text_states true"
        raise CSDiffError(
            f"--adapter {config.adapter} with this objective {lack}, so it cannot be trained on cached text: set "
            f"--data.text online{cure}."
        )
    online = config.data.text == "online" or not cached
    name = _encoder_name(config, data, "text") if online or wants_tokens(config) else None
    if online and not _has_captions(store):
        raise CSDiffError(
            f"--adapter {config.adapter} encodes captions at every step, and {store.path} has no captions: expected "
            "the column caption in metadata/*.parquet."
        )
    if inside:
        _check_named(data, "text", name)
        inputs.inside = name
        inputs.tokenize = load_caption_tokenizer(config.adapter_options.get("text_encoder", name))
        return
    if online and config.data.text == "auto":
        warnings.warn(
            f"Steps are slow: {store.path} has no token states, so {name} encodes {config.batch_size:,} captions at "
            "every step, which takes many times as long as the adapter. Embed once with --text_states true instead, "
            "or choose an adapter for pooled text such as mlp.",
            stacklevel=2,
        )
    if name is not None:
        encoder = load_text_encoder(name, inputs.device)
        check_same_encoder(data.encoder("text"), encoder.describe(), "text", str(store.path), name)
        inputs.project_text = encoder.project
    if online:
        inputs.text_encoder = encoder
        inputs.states_shape = (encoder.max_length, encoder.states_dim) if states else None
    elif states:
        inputs.states_shape = tuple(store.read([0], ["text_states"])["text_states"].shape[1:])
        for group in ("pairs", "unpaired_text"):
            inputs.keys[group] += ("text_states", "text_mask")


def _open_image_tokens(inputs: Inputs, config: TrainConfig, data: TrainingData) -> None:
    """The image encoder that projects tokens, and the images it is to see where tokens are not cached."""
    store = data.store
    if config.image_adapter is not None:
        raise CSDiffError(
            "--image_adapter maps pooled embeddings only: leave it or --objective_options.token_weight out."
        )
    name, cached = _encoder_name(config, data, "image"), "image_tokens" in store.keys
    dataset = config.data.images or (None if is_store(config.data.train) else config.data.train)
    if not cached and (config.data.image == "cached" or dataset is None):
        raise CSDiffError(
            f"--objective_options.token_weight: the token term needs image tokens, and {store.path} has none: embed "
            "again with --image_tokens true, or name the dataset with the images with --data.images."
        )
    inputs.image_encoder = load_image_encoder(name, inputs.device)
    check_same_encoder(data.encoder("image"), inputs.image_encoder.describe(), "image", str(store.path), name)
    if cached and config.data.image != "online":
        inputs.keys["pairs"] += ("image_tokens",)
    else:
        inputs.images = DatasetImages(dataset, store, config.data.allow_outside)


def _check_named(data: TrainingData, side: str, name: str) -> None:
    if data.encoder(side):
        found = {"id": name, "weights_sha256": weights_sha256(encoder_files(name, side).model, side)}
        check_same_encoder(data.encoder(side), found, side, str(data.store.path), name)


def _encoder_name(config: TrainConfig, data: TrainingData, side: str) -> str:
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
