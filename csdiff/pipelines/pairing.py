"""Which adapter fits which decoder: told from JSON files, before any weights are read."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from csdiff.errors import CSDiffError

# One CLIP model is published under several names: an adapter for one of them fits them all.
SAME_ENCODERS = {
    "OpenAI CLIP ViT-L/14": (
        "openai/clip-vit-large-patch14",
        "kakaobrain/karlo-v1-alpha",
        "stabilityai/stable-diffusion-2-1-unclip-small",
    ),
    "OpenCLIP ViT-H/14": (
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "stabilityai/stable-diffusion-2-1-unclip",
    ),
    "OpenCLIP ViT-bigG/14": (
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "kandinsky-community/kandinsky-2-2-prior",
        "kandinsky-community/kandinsky-2-2-decoder",
    ),
}
HUB_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says of itself.

    Attributes:
        path: the folder.
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


def read_json(path: Path) -> dict:
    """Reads a JSON object; CSDiffError when the file is missing, or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CSDiffError(
            f"Expected the file {path}, found nothing; the folder {path.parent} is incomplete."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CSDiffError(f"{path}: expected JSON, found something else ({error}); copy the file again.") from error
    if not isinstance(content, dict):
        raise CSDiffError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


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


def check_encoder(trained: dict | None, found: dict | None, name: str, where: str):
    """Refuses an adapter that was trained on another encoder than `where` has.

    Weight hashes decide when both are known: a renamed copy is the same encoder. Otherwise the names must agree, with
    the names of one published model taken as one. An encoder without a name (a foreign adapter, a model built in
    memory) passes.

    Args:
        trained: the encoder in the adapter's `csdiff.json`, `{"id", "weights_sha256", ...}`.
        found: the encoder of the decoder or the pipeline, the same.
        name: "text encoder" or "image encoder".
        where: what it is the encoder of.

    Raises:
        CSDiffError: naming both encoders.
    """
    if not trained or not found:
        return
    hashes = trained.get("weights_sha256"), found.get("weights_sha256")
    ids = trained.get("id"), found.get("id")
    if all(hashes):
        same, reason = hashes[0] == hashes[1], " (the weights differ)"
    elif all(ids):
        families = [encoder_family(id) or id for id in ids]
        same, reason = families[0] == families[1], ""
        if not all(encoder_family(id) for id in ids):
            reason = ", and without the hashes of both nothing tells whether they are copies of one model"
    else:
        return
    if not same:
        raise CSDiffError(
            f"The adapter was trained on the {name} {ids[0]}, but {where} has {ids[1]}{reason}: use an adapter "
            f"trained on this {name}."
        )


def encoder_family(encoder_id: str | None) -> str | None:
    """The one name of a published encoder, also for a folder called like it; None for another local folder."""
    if not encoder_id:
        return None
    cached = HUB_CACHE.search(encoder_id)
    if cached:
        encoder_id = f"{cached[1]}/{cached[2]}"
    is_name = encoder_id == "tiny-clip" or (HUB_ID.match(encoder_id) and not Path(encoder_id).exists())
    for family, ids in SAME_ENCODERS.items():
        if encoder_id in ids or (not is_name and {id.split("/")[1] for id in ids} & set(Path(encoder_id).parts)):
            return family
    return encoder_id if is_name else None


def encoder_of_module(module, tower: str) -> dict | None:
    """Identity of a loaded transformers model: where it came from and, for a local folder, the hash of its weights."""
    origin = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not origin:
        return None
    folder = Path(origin)
    # what the hub's cache holds is known by its name
    if HUB_CACHE.search(origin) or not any(folder.glob("*.safetensors")):
        return {"id": origin}
    from csdiff.embeddings.fingerprint import weights_sha256

    return {"id": origin, "weights_sha256": weights_sha256(folder, tower)}
