"""Sizes, JSON files and safetensors headers, read without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def folder_size(folder: Path) -> dict[str, int]:
    """Number and bytes of the files below a folder; links are not followed, so that nothing counts twice."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def read_json(file: Path, problems: list[str]) -> dict:
    """A JSON object; what is wrong with the file goes to `problems`, and the object is empty."""
    if not file.is_file():
        problems.append(f"{file} is missing")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{file} is not JSON ({error})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file} holds a {type(content).__name__}, expected a JSON object")
        return {}
    return content


def weights(
    folder: Path, problems: list[str], names: Iterable[str] = (), counts: Callable[[str], bool] = lambda name: True
) -> dict:
    """What the safetensors files of a folder hold, from their headers.

    Args:
        folder: Where they are.
        problems: Is told of missing shards, damaged files, and pickles in their place.
        names: File names to read; by default all, without the copies in other formats (`model.fp16.safetensors`).
        counts: Which tensors are parameters.

    Returns:
        `parameters`, `dtype` (one, or several joined) and `weights`, the files' bytes.
    """
    files = [folder / name for name in names]
    if not files:
        files = sorted(folder.glob("*.safetensors"))
        files = [file for file in files if file.name.count(".") == 1] or files
    for index in folder.glob("*.safetensors.index.json"):
        listed = read_json(index, problems).get("weight_map")
        for name in sorted(set(listed.values())) if isinstance(listed, dict) else ():
            if not (folder / name).is_file():
                problems.append(f"{folder / name} is missing: {index.name} lists it")
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        found = f"the pickle {pickles[0]}, which is never read" if pickles else "none"
        problems.append(f"{folder}: expected *.safetensors, found {found}")
        return {}
    parameters, dtypes = 0, {}
    for file in files:
        for name, (dtype, count) in header(file, problems).items():
            if counts(name):
                parameters += count
                dtypes[dtype] = dtypes.get(dtype, 0) + count
    size = sum(file.stat().st_size for file in files if file.is_file())
    return {
        "parameters": parameters,
        "dtype": ", ".join(sorted(dtypes, key=dtypes.get, reverse=True)),
        "weights": size,
    }


def header(file: Path, problems: list[str]) -> dict[str, tuple[str, int]]:
    """Dtype and number of values of every tensor of a safetensors file."""
    if not file.is_file():
        problems.append(f"{file} is missing")
        return {}
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                count = 1
                for length in part.get_shape():
                    count *= length
                tensors[name] = _DTYPES.get(part.get_dtype(), part.get_dtype()), count
    except (SafetensorError, OSError) as error:
        problems.append(f"{file} is not a whole safetensors file ({error})")
    return tensors


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}
