"""Which adapter fits which decoder: told from JSON files, before any weights are read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from csdiff.embeddings.fingerprint import HUB_CACHE, weights_sha256
from csdiff.errors import CSDiffError
from csdiff.files import read_json


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says of itself.

    Attributes:
        path: The folder.
        config: `config.json`, with `embedding_dim` and `text_dim`.
        metadata: `csdiff.json`.
    """

    path: Path
    config: dict
    metadata: dict

    @property
    def kind(self) -> str:
        """Class name of the adapter."""
        return self.config.get("_class_name", "unknown")

    @property
    def embedding_dim(self) -> int | None:
        """D, the width of the image embeddings it makes."""
        return self.config.get("embedding_dim")

    @property
    def text_dim(self) -> int | None:
        """Width of the text embeddings it takes."""
        return self.config.get("text_dim") or self.embedding_dim

    @cached_property
    def sha256(self) -> str:
        """Hash of the configuration and the weights as first read: the same for copies of one adapter."""
        digest = hashlib.sha256()
        files = [file for file in self.path.rglob("*") if file.suffix == ".safetensors" or file.name == "config.json"]
        for file in sorted(files):
            digest.update(file.relative_to(self.path).as_posix().encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()


def read_adapter_card(adapter: str | os.PathLike) -> AdapterCard:
    """Reads the JSON files of an adapter folder or hub repository; weights stay unread.

    Raises:
        CSDiffError: no such folder, a file is missing, or a JSON file is broken.
    """
    from csdiff.adapters import folder, hub

    path = hub.locate(adapter)
    config = folder.read_config(path)
    if not isinstance(config.get("embedding_dim"), int):
        raise CSDiffError(f"{path / folder.CONFIG} has no embedding_dim; it is not the configuration of an adapter.")
    return AdapterCard(path, config, folder.read_metadata(path))


def text_encoder_options(encoder: dict, card: AdapterCard | None) -> dict:
    """Options of `load_text_encoder` that pool and cut captions as the training did.

    Args:
        encoder: what is known of the encoder, `{"id", "revision", "pooling", ...}`.
        card: the adapter it is loaded for; None for none.

    Returns:
        `revision`, `pooling` and `max_length`, each None where nothing is known.
    """
    tokenizer = (card.metadata.get("tokenizer") if card else None) or {}
    return {
        "revision": encoder.get("revision"),
        "pooling": encoder.get("pooling"),
        "max_length": tokenizer.get("max_length"),
    }


def check_dimensions(config, *, image_dim: int | None, text_dim: int | None, where: str):
    """Refuses an adapter whose embeddings have another width than `where` takes or gives; None is not checked.

    Raises:
        CSDiffError: naming both dimensions.
    """
    embedding_dim = config.get("embedding_dim")
    adapter_text_dim = config.get("text_dim") or embedding_dim
    if image_dim is not None and embedding_dim != image_dim:
        raise CSDiffError(
            f"The adapter makes image embeddings of {embedding_dim} dimensions, but {where} takes {image_dim}: "
            "use an adapter trained on this decoder's image encoder."
        )
    if text_dim is not None and adapter_text_dim != text_dim:
        raise CSDiffError(
            f"The adapter takes text embeddings of {adapter_text_dim} dimensions, but {where} gives {text_dim}: "
            "use the text encoder the adapter was trained on."
        )


def encoder_of_module(module, tower: str) -> dict | None:
    """Identity of a loaded transformers model: where it came from and, for a local folder, the hash of its weights.

    Of an encoder in the folder of a pipeline that states its encoders, what is stated there: a copy in another number
    format has other bytes.
    """
    origin = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not origin:
        return None
    folder = Path(origin)
    beside = folder.parent / "csdiff.json"
    if beside.is_file() and (known := read_json(beside).get(f"{tower}_encoder")):
        return known
    # what the hub's cache holds is known by its name
    if HUB_CACHE.search(origin) or not any(folder.glob("*.safetensors")):
        return {"id": origin}
    return {"id": origin, "weights_sha256": weights_sha256(folder, tower)}
