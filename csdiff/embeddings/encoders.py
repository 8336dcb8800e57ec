"""Text and image encoders: finding their files by id, loading their weights, and what they have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from csdiff.embeddings.fingerprint import HUB_ID, PUBLISHED, Tower, check_same_encoder, weights_sha256
from csdiff.errors import CSDiffError, did_you_mean
from csdiff.files import absolute
from csdiff.hub import download
from csdiff.resources import assets_dir

# Where a saved diffusers pipeline keeps the two towers and what prepares their input.
_PIPELINE_FOLDERS = {
    "text": ("text_encoder", ("tokenizer",)),
    "image": ("image_encoder", ("image_processor", "feature_extractor")),
}
_HUB_PATTERNS = {
    "text": ["*.json", "*.txt", "*.model", "model*.safetensors", "text_encoder/*.safetensors", "tokenizer/*"],
    "image": ["*.json", "model*.safetensors", "image_encoder/*.safetensors"],
}


@dataclass(frozen=True)
class EncoderFiles:
    """Local folders of one encoder, under the id that it was asked for by, and its commit on the hub."""

    id: str
    model: Path  # config.json and the safetensors
    processor: Path  # tokenizer or image processor
    revision: str | None

    def identity(self, tower: Tower) -> dict:
        """Name, revision and hash of one tower, as a `csdiff.json` records them; reads the weights."""
        digest = weights_sha256(self.model, tower)
        return {"id": encoder_name(self.id), "revision": self.revision, "weights_sha256": digest}


class Encoder:
    """A frozen transformers model and the files it came from.

    Attributes:
        dim: D, width of the pooled embeddings.
        pooling: How token states become one embedding, where there is a choice.
    """

    tower: ClassVar[Tower]
    dim: int
    pooling: str | None = None

    def __init__(self, model, files: EncoderFiles):
        self.model, self.id, self.files = model, encoder_name(files.id), files

    @property
    def device(self):
        return self.model.device

    @cached_property
    def _identity(self) -> dict:
        return self.files.identity(self.tower)

    def describe(self, weights: bool = True) -> dict:
        """This encoder's part of a `csdiff.json`; without `weights` what needs no reading of the files."""
        facts = {"dim": self.dim, "class": type(self.model).__name__}
        facts |= {"pooling": self.pooling} if self.pooling else {}
        facts["dtype"] = str(self.model.dtype).removeprefix("torch.")
        return {**self._identity, **facts} if weights else facts


def resolve_encoder(id: str | Path) -> str:
    """Map the name of a shipped encoder to its folder ("tiny-clip" to `assets/clip`); any other id stays as it is."""
    return str(assets_dir() / "clip") if id == "tiny-clip" else str(id)


def encoder_name(id: str | Path) -> str:
    """The one name of an encoder, as a `csdiff.json` records it: "tiny-clip", an absolute folder, or a hub id."""
    if id == "tiny-clip":
        return str(id)
    folder = absolute(id)
    return str(folder) if folder.is_dir() else str(id)


def encoder_files(id: str | Path, tower: Tower, revision: str | None = None) -> EncoderFiles:
    """Local folders of an encoder, downloaded from the hub when the id is not a folder.

    Raises:
        CSDiffError: Neither a folder nor an id that the hub (or its local cache, when offline) knows.
    """
    name = resolve_encoder(id)
    folder, commit = Path(name).expanduser(), None
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise CSDiffError(
                f"{name}: expected a folder with a {tower} encoder, found none; check --{tower}_encoder."
            )
        options = {"allow_patterns": _HUB_PATTERNS[tower], "ignore_patterns": "*.fp16.*"}
        near = did_you_mean(name, ["tiny-clip"]).removeprefix("; ")
        folder = download(name, f"a {tower} encoder{near and f' ({near})'}", revision=revision, **options)
        commit = folder.name
    if (folder / "model_index.json").exists():
        model, processors = _PIPELINE_FOLDERS[tower]
        processor = next((folder / p for p in processors if (folder / p).is_dir()), None)
        if not (folder / model).is_dir() or processor is None:
            raise CSDiffError(
                f"{id}: expected a pipeline with {model}/ and {'/ or '.join(processors)}/, found neither or only one; "
                f"name the {tower} encoder that this pipeline was trained with."
            )
        return EncoderFiles(str(id), folder / model, processor, commit)
    if not (folder / "config.json").exists():
        raise CSDiffError(f"{id}: expected a model folder with config.json for the {tower} encoder, found none.")
    return EncoderFiles(str(id), folder, folder, commit)


def find_encoder(
    known: dict | None,
    tower: Tower,
    given: str | Path | None = None,
    of: str = "the adapter",
    beside: Iterable[str | Path | None] = (),
) -> dict:
    """Where an encoder is that a `csdiff.json` names; what the user names instead must have the same weights.

    A record comes from whoever made the folder: a hub repository that only the record names is not fetched, unless it
    is one of the published encoders; it must be here already, or be named by the user.

    Args:
        known: The encoder's part of a `csdiff.json`: `{"id", "revision", "weights_sha256", ...}`.
        tower: Which of the two.
        given: The folder or hub id the user names, e.g. of an encoder that has moved.
        of: Whose record it is, for the message.
        beside: Folders that may have moved together with the encoder, see `nearby`.

    Returns:
        `known`, with the "id" that was found (of a folder, its absolute path).

    Raises:
        CSDiffError: Nothing known and nothing given, nothing there, or another encoder than the one known.
    """
    known, option = known or {}, f"name it with --{tower}_encoder (in Python {tower}_encoder=)"
    if given is not None:
        found = encoder_files(given, tower).identity(tower)
        check_same_encoder(known, found, tower, of, str(given))
        return {**known, **found}
    if not known.get("id"):
        raise CSDiffError(f"{of} names no {tower} encoder; {option}.")
    known = nearby(known, tower, *beside)
    id = known["id"]
    if _is_here(id, tower):
        return {**known, "id": encoder_name(id)}
    if not HUB_ID.fullmatch(id):
        raise CSDiffError(f"{of} names the {tower} encoder {id}, which is no folder here; {option} where it is now.")
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "model_index.json"):
        if isinstance(try_to_load_from_cache(id, file, revision=known.get("revision")), str):
            return known
    raise CSDiffError(
        f"{of} names the {tower} encoder {id}, which is none of the published ones and not on this machine; to "
        f"have it fetched from the hub, {option}."
    )


def nearby(known: dict, tower: Tower, *beside: str | Path | None) -> dict:
    """A record of an encoder whose folder may have moved with other folders: `known`, or with the "id" found.

    A recorded folder that is gone is looked for beside these places and in the folders above them, under the end of
    its old name (`models/clip`, `clip`), with the recorded hash of its weights.
    """
    id, digest = str(known.get("id") or "tiny-clip"), known.get("weights_sha256")
    # A hub id is no place; only its weights tell that a folder of its name is it.
    if _is_here(id, tower) or (HUB_ID.fullmatch(id) and not digest):
        return known
    parts = [part for part in re.split(r"[/\\]+", id) if part not in ("", ".", "..", "~")]
    bases = [base for place in beside if place for base in (absolute(place), *list(absolute(place).parents)[:3])]
    for folder in (base.joinpath(*parts[start:]) for base in dict.fromkeys(bases) for start in range(len(parts))):
        if folder.is_dir():
            try:
                files = encoder_files(folder, tower)
                if digest is None or weights_sha256(files.model, tower) == digest:
                    return {**known, "id": str(folder)}
            except CSDiffError:  # Another folder of that name.
                continue
    return known


def _is_here(id: str, tower: Tower) -> bool:
    """Whether an id is a folder, or a published encoder."""
    return Path(resolve_encoder(id)).expanduser().is_dir() or any(id in names[tower] for names in PUBLISHED.values())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting the tensors of the other tower as unexpected."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(files: EncoderFiles):
    """The model's `config.json`; refused if transformers does not know it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(files.model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        found = f"found none ({' '.join(str(error).split())[:200]})"
        raise CSDiffError(f"{files.id}: expected the config.json of a transformers model, {found}.") from error


def load_weights(model_class: type, files: EncoderFiles, device, dtype):
    """`model_class.from_pretrained`, safetensors only, every weight present, in evaluation mode without gradients."""
    import torch
    from safetensors import SafetensorError

    device = torch.device(device or "cpu")
    with quiet_loading():
        try:
            model, info = model_class.from_pretrained(
                files.model,
                # Half precision is for accelerators: transformers would keep a float16 folder's on the CPU too.
                dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CSDiffError(f"{files.id}: the weights cannot be loaded: {' '.join(str(error).split())}") from error
    if missing := sorted(info["missing_keys"]):
        raise CSDiffError(
            f"{files.id}: expected a {model_class.__name__}, found no weights for {missing[0]} "
            f"({len(missing)} tensors missing); use the encoder with its projection."
        )
    return model.to(device).eval().requires_grad_(False)
