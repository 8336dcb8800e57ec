"""The files of an adapter folder, checked before anything in it is loaded.

`config.json`, `*.safetensors`, `csdiff.json` and `README.md`. No file is ever executed.
"""

from __future__ import annotations

import inspect
import re
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdiff.embeddings.encoders import nearby
from csdiff.errors import CSDiffError
from csdiff.files import read_json, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
METADATA = "csdiff.json"
CARD = "README.md"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1

Header = dict[str, tuple[str, tuple[int, ...], Path]]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PARTS = (
    "text_encoder", "image_encoder", "tokenizer", "preprocessing", "statistics", "objective", "data", "training",
    "metrics", "versions",
)  # fmt: skip
# What the entries of csdiff.json must be where they are known; null and absent mean that they are not.
_TYPES: dict[str, type] = {
    **dict.fromkeys(_PARTS, dict),
    **{
        f"{t}_encoder.{key}": str for t in ("text", "image") for key in ("id", "revision", "weights_sha256", "pooling")
    },
    "tokenizer.max_length": int,
    "data.train": str,
    "training.weights": str,
    "training.steps": int,
    "normalized": bool,
    "license": str,
}
_TYPE_NAMES = {dict: "an object", str: "a string", int: "a whole number", bool: "true or false"}


def complete_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of `csdiff.json`: `metadata` with format, kind and library versions filled in."""
    versions = {}
    for name in ("csdiff", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            versions[name] = None
    return {**metadata, "format": FORMAT, "kind": "adapter", "versions": {**metadata.get("versions", {}), **versions}}


def read_config(path: Path, cls: type | None = None) -> dict[str, Any]:
    """Reads and checks `config.json`; with `cls`, it must be a config of that class.

    Raises:
        CSDiffError: No folder, no file, no JSON object, another class or an unknown key.
    """
    if not path.exists():
        raise CSDiffError(f"Adapter folder {path} does not exist; give a folder saved by `save_pretrained`.")
    if not path.is_dir():
        raise CSDiffError(f"{path} is a file; give the adapter folder (with {CONFIG}, *.safetensors and {METADATA}).")
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
    if metadata.get("format") != FORMAT or metadata.get("kind") != "adapter":
        raise CSDiffError(
            f'{path / METADATA} must say "format": {FORMAT} and "kind": "adapter"; found '
            f"{metadata.get('format')!r} and {metadata.get('kind')!r}."
        )
    for name, expected in _TYPES.items():
        part, _, key = name.rpartition(".")
        value = (metadata.get(part) or {}).get(key) if part else metadata.get(key)
        if value is not None and type(value) is not expected:
            raise CSDiffError(
                f"{path / METADATA}: {name} must be {_TYPE_NAMES[expected]}, found a {type(value).__name__}; copy or "
                "save the adapter again."
            )
    for tower in ("text", "image"):
        if metadata.get(f"{tower}_encoder"):
            metadata[f"{tower}_encoder"] = nearby(metadata[f"{tower}_encoder"], tower, path)
    return metadata


def read_part(file: Path) -> dict[str, Any]:
    """Reads a JSON file of an adapter folder.

    Raises:
        CSDiffError: No such file (and what the folder lacks, or is instead), or no JSON object in it.
    """
    if file.is_file():
        return read_json(file)
    if (file.parent / "model_index.json").is_file():
        raise CSDiffError(f"{file.parent} is a diffusers pipeline, not an adapter; a decoder goes to --decoder.")
    raise CSDiffError(
        f"Adapter folder {file.parent} is incomplete: {file.name} is missing; it needs {CONFIG}, *.safetensors "
        f"and {METADATA}."
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
    if variant is None and path.is_dir():
        found = {variant_of(file.name) for file in path.glob(f"{name.partition('.')[0]}*.safetensors")}
        return found.pop() if len(found) == 1 else None
    return variant


def weight_files(path: Path, variant: str | None = None, name: str = WEIGHTS) -> list[Path]:
    """The safetensors files of the folder: one, or the shards that its index lists.

    Raises:
        CSDiffError: None there (and whether a pickle is there instead), or a shard is missing.
    """
    index = path / with_variant(f"{name}.index.json", variant)
    single = path / with_variant(name, variant)
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CSDiffError(f"{index} has no `weight_map` from tensor names to files; save the adapter again.")
        shards = [path / file for file in sorted(set(weight_map.values()))]
        for shard in shards:
            if shard.parent != path or shard.suffix != ".safetensors" or not shard.is_file():
                raise CSDiffError(f"{index} lists {shard.name!r}, which is not a safetensors file in {path}.")
        return shards
    others = sorted(file.name for file in path.glob(f"{name.partition('.')[0]}*.safetensors"))
    pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _PICKLE_SUFFIXES)
    found = f"; there is {others[0]}, of another `variant`" if others else ""
    if pickles and not others:
        found = f"; {pickles[0]} is a pickle, which can run code and is never loaded: ask for safetensors"
    raise CSDiffError(f"Adapter folder {path} is incomplete: {single.name} is missing{found}.")


def read_header(files: list[Path]) -> Header:
    """Dtype, shape and file of every tensor in safetensors files; no tensor is read."""
    return {name: (*entry, file) for file in files for name, entry in read_safetensors_header(file).items()}


def check_weights(path: Path, cls: type, config: dict[str, Any], found: Header) -> None:
    """Compares the tensors of the weight files with those the config asks for, without loading any.

    Raises:
        CSDiffError: A config the class refuses, or tensors missing, left over, of another shape or dtype.
    """
    import torch

    # Every layer has a tensor: a config that asks for more would take minutes to build, even without memory.
    layers = config.get("num_layers")
    if isinstance(layers, int) and layers > len(found):
        raise CSDiffError(
            f"{path / CONFIG} asks for {layers} layers, but its weights hold {len(found)} tensors in all; copy both "
            "files from one adapter."
        )
    try:
        with torch.device("meta"):
            expected = cls.from_config(dict(config)).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CSDiffError(f"{path / CONFIG} does not describe a {cls.__name__}: {reason}") from error
    compare_tensors(path, expected, found)


def compare_tensors(path: Path, expected: dict[str, Tensor], found: Header) -> None:
    """Raises a `CSDiffError` that names the first difference between expected tensors and those in the files."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CSDiffError(f"The weights in {path} lack {missing[:3]}, {len(missing)} of {len(expected)} tensors.")
    if extra:
        raise CSDiffError(
            f"The weights in {path} have {extra[:3]}, {len(extra)} tensors that {CONFIG} has no use for."
        )
    for name, tensor in expected.items():
        dtype, shape, file = found[name]
        if shape != tuple(tensor.shape) or dtype not in _FLOATS:
            raise CSDiffError(
                f"{file}: tensor {name} must hold floats of shape {list(tensor.shape)}, found {dtype}, {list(shape)}."
            )


def check_values(path: Path, tensors: dict[str, Tensor], found: Header | None = None) -> None:
    """Raises a `CSDiffError` that names file and tensor when a value is not finite, or a deviation not positive."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        file = found[name][2] if found and name in found else path
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CSDiffError(f"{file}: tensor {name} holds {count} values that are NaN or infinite; train again.")
        if name in ("clip_std", "text_std") and not (tensor > 0).all():
            count = int((tensor <= 0).sum())
            raise CSDiffError(
                f"{file}: tensor {name} holds {count} deviations that are zero or negative, where all must be "
                "positive; set them by `set_statistics` and save the adapter again."
            )
