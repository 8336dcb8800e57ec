"""The adapter folder on disk: written whole, and checked before anything in it is loaded.

`config.json`, `*.safetensors`, `csdiff.json` and `README.md`. Weights are recognised by their content, so that a
pickle under any name is refused; no file is ever executed.
"""

import inspect
import json
import os
from contextlib import contextmanager
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import torch

from csdiff.errors import CSDiffError
from csdiff.files import writing_folder

CONFIG = "config.json"
METADATA = "csdiff.json"
CARD = "README.md"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"F64", "F32", "F16", "BF16"}


def complete_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of `csdiff.json`: `metadata` with format, kind and library versions filled in."""
    versions = {}
    for name in ("csdiff", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            versions[name] = None
    return {**metadata, "format": FORMAT, "kind": "adapter", "versions": {**metadata.get("versions", {}), **versions}}


@contextmanager
def written_whole(directory: str | os.PathLike):
    """Yields a fresh folder beside or inside `directory` and moves what was written there into place at the end.

    A new folder appears by one rename. In a folder that exists, each file is replaced by one rename, weights of an
    earlier save that the new one does not have are removed, and files of others stay.

    Raises:
        CSDiffError: The place cannot be written.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise CSDiffError(f"Cannot save the adapter to {target}: it is a file; name a folder.")
    try:
        with writing_folder(target) as aside:
            yield aside
    except OSError as error:
        raise CSDiffError(
            f"Cannot save the adapter to {target}: {error.strerror or error}; choose a folder that can be written "
            "and has room."
        ) from error


def read_config(path: Path, cls: type | None = None) -> dict[str, Any]:
    """Reads and checks `config.json`; with `cls`, it must be a config of that class.

    Raises:
        CSDiffError: No folder, no file, no JSON object, another class or an unknown key.
    """
    if not path.exists():
        raise CSDiffError(f"Adapter folder {path} does not exist; give a folder saved by `save_pretrained`.")
    if not path.is_dir():
        raise CSDiffError(f"{path} is a file; give the adapter folder (with {CONFIG}, *.safetensors and {METADATA}).")
    config = read_json(path / CONFIG)
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
    """Reads and checks `csdiff.json` of an adapter folder."""
    metadata = read_json(path / METADATA)
    if metadata.get("format") != FORMAT or metadata.get("kind") != "adapter":
        raise CSDiffError(
            f'{path / METADATA} must say "format": {FORMAT} and "kind": "adapter"; found '
            f"{metadata.get('format')!r} and {metadata.get('kind')!r}."
        )
    return metadata


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object, or raises a `CSDiffError` that names the file."""
    if not file.is_file():
        if (file.parent / "model_index.json").is_file():
            raise CSDiffError(f"{file.parent} is a diffusers pipeline, not an adapter; a decoder goes to --decoder.")
        raise CSDiffError(
            f"Adapter folder {file.parent} is incomplete: {file.name} is missing; it needs {CONFIG}, *.safetensors "
            f"and {METADATA}."
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CSDiffError(f"{file} cannot be read as JSON ({error}); copy or save the adapter again.") from error
    if not isinstance(content, dict):
        raise CSDiffError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def weight_files(path: Path, variant: str | None = None, name: str = WEIGHTS) -> list[Path]:
    """The safetensors files of the folder: one, or the shards that its index lists.

    Raises:
        CSDiffError: None there (and whether a pickle is there instead), or a shard is missing.
    """
    stem = name.removesuffix(".safetensors")
    suffix = f".{variant}" if variant else ""
    index = path / f"{stem}.safetensors.index{suffix}.json"
    single = path / f"{stem}{suffix}.safetensors"
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
    pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _PICKLE_SUFFIXES)
    if pickles:
        raise CSDiffError(
            f"{path} holds {pickles[0]}, a pickle, where {single.name} is expected; pickles are never loaded, "
            "because they can run code: ask for safetensors."
        )
    raise CSDiffError(f"Adapter folder {path} is incomplete: {single.name} is missing.")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor names to `{"dtype", "shape", "data_offsets"}`, from a safetensors header that agrees with the file size.

    Raises:
        CSDiffError: A pickle or zip archive by content, something else, or a truncated file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not (2 <= length <= 100_000_000 and stream.read(1) == b"{"):
            stream.seek(0)
            start = stream.read(512)
            # Zip archives (torch.save), pickles by protocol mark, tar archives (oldest torch.save).
            if start[:2] == b"PK" or start[:1] == b"\x80" or b"ustar" in start:
                raise CSDiffError(
                    f"{file} is a pickle or an archive, expected safetensors; pickles are never loaded, because they "
                    "can run code: ask for safetensors."
                )
            raise CSDiffError(f"{file} is not a safetensors file ({size} bytes, no header); copy it again.")
        if 8 + length > size:
            raise CSDiffError(
                f"{file} is truncated: its header takes {8 + length} bytes, found {size}; copy it again."
            )
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            shapes_known = all(isinstance(entry["shape"], list) and entry["dtype"] for entry in header.values())
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CSDiffError(f"{file} has a damaged safetensors header; copy it again.") from error
    if not shapes_known or end != size:
        state = "truncated" if end > size else "damaged"
        raise CSDiffError(f"{file} is {state}: its header promises {end} bytes, found {size}; copy it again.")
    return header


def check_weights(path: Path, cls: type, config: dict[str, Any], variant: str | None = None) -> None:
    """Compares the tensors of the weight files with those the config asks for, without loading any.

    Raises:
        CSDiffError: A config the class refuses, or tensors missing, left over, of another shape or dtype.
    """
    files = weight_files(path, variant)
    found = {name: (entry, file) for file in files for name, entry in read_header(file).items()}
    try:
        with torch.device("meta"):
            expected = cls.from_config(dict(config)).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CSDiffError(f"{path / CONFIG} does not describe a {cls.__name__}: {error}") from error
    compare_tensors(files[0], {name: tuple(t.shape) for name, t in expected.items()}, found)


def compare_tensors(file: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[dict, Path]]) -> None:
    """Raises a `CSDiffError` that names the first differences between expected shapes and found header entries."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CSDiffError(f"{file} lacks {len(missing)} of {len(expected)} tensors, among them {missing[:3]}.")
    if extra:
        raise CSDiffError(f"{file} has {len(extra)} tensors that its config does not ask for, among them {extra[:3]}.")
    for name, shape in expected.items():
        entry, where = found[name]
        if tuple(entry["shape"]) != shape:
            raise CSDiffError(f"{where}: tensor {name} must have shape {shape}, found {tuple(entry['shape'])}.")
        if entry["dtype"] not in _DTYPES:
            raise CSDiffError(f"{where}: tensor {name} must hold floats {sorted(_DTYPES)}, found {entry['dtype']}.")


def check_finite(path: Path, adapter: torch.nn.Module) -> None:
    """Raises a `CSDiffError` when a tensor of the adapter holds NaN or infinity."""
    for name, tensor in adapter.state_dict().items():
        if not tensor.is_meta and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CSDiffError(f"{path}: tensor {name} holds {count} values that are NaN or infinite; train again.")
