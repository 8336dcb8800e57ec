"""The files of an adapter folder, checked before anything in it is loaded. No file is ever executed."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdiff.embeddings.encoders import nearby
from csdiff.embeddings.fingerprint import HUB_ID
from csdiff.errors import CSDiffError
from csdiff.files import PICKLES, check_types, read_json, read_safetensors_header
from csdiff.hub import download
from csdiff.kinds import described, kind_of

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
METADATA = "csdiff.json"
CARD = "README.md"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1
_HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_HUB_FILES = ("*.json", "*.safetensors", "README.md")

Header = dict[str, tuple[str, tuple[int, ...], Path]]

_FLOATS = {"F64", "F32", "F16", "BF16"}
# What the entries of csdiff.json are.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("text_encoder", "image_encoder", "tokenizer", "preprocessing", "statistics"), dict),
    **dict.fromkeys(("objective", "data", "training", "metrics", "versions"), dict),
    **dict.fromkeys((f"text_encoder.{key}" for key in ("id", "revision", "weights_sha256", "pooling")), str),
    **dict.fromkeys((f"image_encoder.{key}" for key in ("id", "revision", "weights_sha256")), str),
    **dict.fromkeys(("data.train", "training.weights", "license"), str),
    **dict.fromkeys(("tokenizer.max_length", "training.steps"), int),
    "normalized": bool,
}


def locate(name_or_path: str | os.PathLike, options: dict[str, Any] | None = None) -> Path:
    """The folder of an adapter: a local one as it is, of a hub repository ("owner/name") the downloaded snapshot.

    `subfolder` and what `huggingface_hub.snapshot_download` knows of `options` are taken out of them.

    Raises:
        CSDiffError: Neither a folder here nor a repository that can be reached.
    """
    where = {name: options.pop(name) for name in _HUB_OPTIONS if name in options} if options else {}
    path, subfolder = Path(name_or_path), where.pop("subfolder", None)
    if on_hub(name_or_path):
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _HUB_FILES]
        path = download(name_or_path, "an adapter", allow_patterns=patterns, **where)
    return path / subfolder if subfolder else path


def on_hub(name_or_path: str | os.PathLike) -> bool:
    """Whether a hub repository ("owner/name") is meant, rather than a folder here."""
    path = Path(name_or_path)
    is_id = isinstance(name_or_path, str) and HUB_ID.fullmatch(name_or_path) is not None
    # `runs/adapter` looks like an id too: where `runs` is a folder here, a missing `adapter` is meant.
    return is_id and not path.exists() and not path.parent.is_dir()


def complete_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of `csdiff.json`: `metadata` with format, kind and library versions filled in."""
    installed = ("csdiff", "torch", "diffusers", "transformers", "peft")
    versions = {**metadata.get("versions", {}), **{name: distributions.version(name) for name in installed}}
    return {**metadata, "format": FORMAT, "kind": "adapter", "versions": versions}


def read_config(path: Path, cls: type | None = None) -> dict[str, Any]:
    """Reads and checks `config.json`; with `cls`, it must be a config of that class.

    Raises:
        CSDiffError: No folder, no file, no JSON object, another class or an unknown key.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CSDiffError(f"Adapter folder {path} {found}; give one with {CONFIG}, *.safetensors and {METADATA}.")
    config = read_part(path / CONFIG)
    found = config.get("_class_name")
    if not isinstance(found, str):
        raise CSDiffError(f"{path / CONFIG} names no class (`_class_name`); it is not the config of an adapter.")
    if cls is None:
        return config
    if found != cls.__name__:
        raise CSDiffError(
            f"{path / CONFIG} is the config of {found}, expected {cls.__name__}; load it with AutoAdapter."
        )
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    extra = sorted(name for name in config if not name.startswith("_") and name not in known)
    if extra:
        raise CSDiffError(
            f"{path / CONFIG} has keys {extra} that {cls.__name__} does not know; known: {sorted(known)}."
        )
    return config


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads `csdiff.json` of an adapter folder and checks the types of what is read from it.

    Raises:
        CSDiffError: No file, no JSON object, of another kind, or an entry of another type (named).
    """
    metadata = read_part(path / METADATA)
    format, kind = metadata.get("format"), metadata.get("kind")
    if (format, kind) != (FORMAT, "adapter"):
        expected = f'"format": {FORMAT} and "kind": "adapter"'
        raise CSDiffError(f"{path / METADATA} must say {expected}; found {format!r} and {kind!r}.")
    check_types(path / METADATA, metadata, _TYPES, "save the adapter again")
    for tower in ("text", "image"):
        if metadata.get(f"{tower}_encoder"):
            metadata[f"{tower}_encoder"] = nearby(metadata[f"{tower}_encoder"], tower, path)
    return metadata


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says of itself."""

    path: Path
    config: dict  # `config.json`, with `embedding_dim` and `text_dim`
    metadata: dict  # `csdiff.json`

    @property
    def kind(self) -> str:
        return self.config.get("_class_name", "unknown")

    @property
    def embedding_dim(self) -> int | None:
        """D, the width of the image embeddings it makes."""
        return self.config.get("embedding_dim")

    @property
    def text_dim(self) -> int | None:
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
    """Reads the JSON files of an adapter folder or hub repository.

    Raises:
        CSDiffError: no such folder, a file is missing, or a JSON file is broken.
    """
    path = locate(adapter)
    config = read_config(path)
    if not isinstance(config.get("embedding_dim"), int):
        raise CSDiffError(f"{path / CONFIG} has no embedding_dim; it is not the configuration of an adapter.")
    return AdapterCard(path, config, read_metadata(path))


def read_part(file: Path) -> dict[str, Any]:
    """Reads a JSON file of an adapter folder.

    Raises:
        CSDiffError: No such file (and what the folder lacks, or is instead), or no JSON object in it.
    """
    if file.is_file():
        return read_json(file)
    whole = file.name == CONFIG and kind_of(file.parent) != "adapter"
    raise CSDiffError(
        f"Expected an adapter ({CONFIG}, *.safetensors, {METADATA}), but {file.name} is missing: {file.parent} "
        f"{described(file.parent) if whole else 'is incomplete'}."
    )


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weights file with a variant, as diffusers makes it: `model.fp16.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def variant_of(file: str) -> str | None:
    """The variant in the name of a weights file, of a shard or an index too."""
    return re.sub(r"^[^.]*(\.safetensors\.index)?|(-\d+-of-\d+)?\.(safetensors|json)$", "", file).strip(".") or None


def find_variant(path: Path, variant: str | None = None, name: str = WEIGHTS) -> str | None:
    """`variant`; without one, that of a folder which holds no other weights."""
    found = {variant_of(file.name) for file in path.glob(f"{name.partition('.')[0]}*.safetensors")}
    return found.pop() if variant is None and len(found) == 1 else variant


def weight_files(path: Path, variant: str | None = None, name: str = WEIGHTS) -> list[Path]:
    """The safetensors files of the folder: one, or the shards that its index lists.

    Raises:
        CSDiffError: None there (and whether a pickle is there instead), or a shard is missing.
    """
    index, single = path / with_variant(f"{name}.index.json", variant), path / with_variant(name, variant)
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CSDiffError(f"{index} has no `weight_map` from tensor names to files; save the adapter again.")
        shards = [path / str(file) for file in sorted(set(weight_map.values()))]
        for shard in shards:
            if shard.parent != path or shard.suffix != ".safetensors" or not shard.is_file():
                raise CSDiffError(f"{index} lists {shard.name!r}, which is not a safetensors file in {path}.")
        return shards
    others = sorted(file.name for file in path.glob(f"{name.partition('.')[0]}*.safetensors"))
    pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in PICKLES)
    found = f"; there is {others[0]}, of another `variant`" if others else ""
    if pickles and not others:
        found = f"; {pickles[0]} is a pickle, which can run code and is never loaded: ask for safetensors"
    raise CSDiffError(f"The folder {path} is incomplete: {single.name} is missing{found}.")


def read_header(files: list[Path]) -> Header:
    """Dtype, shape and file of every tensor in safetensors files; no tensor is read."""
    return {name: (*entry, file) for file in files for name, entry in read_safetensors_header(file).items()}


def check_sizes(path: Path, config: dict[str, Any], found: Header) -> None:
    """Raises a `CSDiffError` where the config asks for what the tensors do not have, before it is built in memory."""
    layers = config.get("num_layers")
    if isinstance(layers, int) and layers > len(found):
        raise CSDiffError(
            f"{path / CONFIG} asks for num_layers {layers}, but its weights are {len(found)} tensors in all; put the "
            "files of one adapter together."
        )
    for size, tensor, axis in (
        ("embedding_dim", "clip_mean", -1),
        ("text_dim", "text_mean", -1),
        ("rank", "lora_A", 0),
    ):
        there = sorted({shape[axis] for name, (_, shape, _) in found.items() if tensor in name and shape})
        if config.get(size) is not None and [config[size]] != there:
            raise CSDiffError(
                f"{path / CONFIG} asks for {size} {config[size]!r}, but the shapes of {tensor} in its weights say "
                f"{there}; put the files of one adapter together."
            )


@contextmanager
def described_by(path: Path, cls: type) -> Iterator[None]:
    """Says that a config is to blame for what goes wrong while a `cls` is built of it."""
    try:
        yield
    except CSDiffError:
        raise
    # a value of another type fails wherever it is first used
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CSDiffError(f"{path / CONFIG} does not describe a {cls.__name__}: {reason}") from error


def check_tensors(path: Path, expected: dict[str, Tensor], found: Header) -> None:
    """Raises a `CSDiffError` that names the first difference between expected tensors and those in the files."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise CSDiffError(
            f"The weights in {path} do not fit {CONFIG}: {missing[:3]} missing, {extra[:3]} left over, "
            f"{len(missing)} and {len(extra)} of {len(expected)} tensors; put the files of one adapter together."
        )
    for name, tensor in expected.items():
        dtype, shape, file = found[name]
        if shape != tuple(tensor.shape) or dtype not in _FLOATS:
            raise CSDiffError(
                f"{file}: tensor {name} must hold floats of shape {list(tensor.shape)}, found {dtype}, {list(shape)}."
            )


def check_values(tensors: dict[str, Tensor], found: Header) -> None:
    """Raises a `CSDiffError` that names file and tensor when a value is not finite, or a deviation not positive."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        deviation = name in ("clip_std", "text_std")
        good = tensor.isfinite() & (tensor > 0) if deviation else tensor.isfinite()
        if not good.all():
            kind = "zero, negative, NaN or infinite deviations" if deviation else "values that are NaN or infinite"
            raise CSDiffError(
                f"{found[name][2]}: tensor {name} holds {int((~good).sum())} {kind}; train again, or save the adapter "
                "again."
            )
