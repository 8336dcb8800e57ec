"""What identifies an encoder and the files of a store: hashes, and their comparison."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path

from csdiff.errors import CSDiffError

# Which tensors of a CLIP folder belong to which tower: a whole CLIPModel and a tower saved alone get one hash.
TOWER_PREFIXES = {"text": ("text_model.", "text_projection."), "image": ("vision_model.", "visual_projection.")}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(folder: str | Path, tower: str | None = None) -> str:
    """SHA-256 of the tensors in a folder's safetensors files.

    Taken over name, dtype, shape and bytes of every tensor in the order of the names, so that neither the split into
    files nor their headers matter. Of a CLIP folder only the tensors of one tower count: the text tower of a whole
    `CLIPModel` and the same tower saved as `CLIPTextModelWithProjection` have the same hash.

    Args:
        folder: Holds `model.safetensors`, or several files of it.
        tower: "text" or "image"; None for all tensors.

    Raises:
        CSDiffError: No safetensors there, or a file that is not one.
    """
    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        found = sorted(path.name for path in folder.glob("*.bin")) or "no weights"
        raise CSDiffError(
            f"{folder}: expected safetensors weights, found {found}; pickled weights are never read, save the model "
            "with save_pretrained(..., safe_serialization=True)."
        )
    # `model.safetensors` beside `model.fp16.safetensors`: the plain name is the one that transformers loads.
    plain = [path for path in files if path.name == "model.safetensors"]
    entries = {name: entry for path in plain or files for name, entry in _tensors(path).items()}
    prefixes = TOWER_PREFIXES.get(tower, ())
    names = [name for name in sorted(entries) if name.startswith(prefixes)] if prefixes else []
    digest = hashlib.sha256()
    maps: dict[Path, mmap.mmap] = {}
    for name in names or sorted(entries):
        # Not a weight: older checkpoints carry this index buffer, newer ones do not.
        if name.endswith(".position_ids"):
            continue
        path, start, stop, dtype, shape = entries[name]
        if path not in maps:
            with path.open("rb") as file:
                maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        digest.update(json.dumps([name, dtype, shape]).encode())
        with memoryview(maps[path]) as view:
            digest.update(view[start:stop])
    for view in maps.values():
        view.close()
    return digest.hexdigest()


def check_same_encoder(expected: dict | None, found: dict | None, what: str, expected_in: str, found_in: str) -> None:
    """Refuse two descriptions of different encoders; parts that either side does not know are not compared.

    Args:
        expected: An encoder's part of a `csdiff.json`: `{"id", "revision", "weights_sha256", "dim", ...}`.
        found: The other one.
        what: "text encoder" or "image encoder", for the message.
        expected_in: Where `expected` comes from, for the message.
        found_in: Where `found` comes from.

    Raises:
        CSDiffError: They differ in weights, in dimension or in pooling; without known weights, in id.
    """
    expected, found = expected or {}, found or {}
    weights = expected.get("weights_sha256"), found.get("weights_sha256")
    # The weights decide; the id is a name and may be a folder that has moved.
    keys = ["weights_sha256"] if all(weights) else ["id"]
    for key in [*keys, "dim", "pooling"]:
        if expected.get(key) is not None and found.get(key) is not None and expected[key] != found[key]:
            raise CSDiffError(
                f"The {what} of {found_in} is not the one of {expected_in}: {key} expected {expected[key]!r} "
                f"({expected.get('id')}), found {found[key]!r} ({found.get('id')}); use one encoder for both, "
                "or embed again."
            )


def _tensors(path: Path) -> dict[str, tuple]:
    """Place, dtype and shape of every tensor of a safetensors file, from its header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        base = 8 + size
        entries = {}
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            if base + stop > path.stat().st_size:
                raise ValueError(f"{name} ends beyond the end of the file")
            entries[name] = (path, base + start, base + stop, tensor["dtype"], tensor["shape"])
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CSDiffError(f"{path} is not a whole safetensors file ({error}); download or save it again.") from error
