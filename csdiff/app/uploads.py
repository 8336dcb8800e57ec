"""Uploaded files put back into the folder they were: browsers hand over the files of a folder without its shape."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from csdiff.errors import CSDiffError

# What adapters and stores are made of; nothing else is of use here, and pickles are not even kept.
SUFFIXES = frozenset((".json", ".safetensors", ".npy", ".parquet", ".md"))
# Shards of a store lie in folders of their names: img_emb/img_emb_0.npy.
SHARD = re.compile(r"(?P<folder>img_emb|text_emb|text_states|text_mask|image_tokens|metadata)_\d+\.(npy|parquet)$")
MOST_FILES = 200


def gather(files: Sequence[str]) -> Path:
    """Copies uploaded files into a new folder, shards of a store into folders of their own.

    Raises:
        CSDiffError: too many files, or none that an adapter or a store is made of.
    """
    if len(files) > MOST_FILES:
        raise CSDiffError(
            f"Expected the files of an adapter or a store, at most {MOST_FILES}, found {len(files)}; type the path of "
            "a larger one."
        )
    kept = [Path(file) for file in files if Path(file).suffix.lower() in SUFFIXES]
    if not kept:
        names = ", ".join(Path(file).name for file in files[:4])
        raise CSDiffError(
            f"Expected the files of an adapter or a store (*.json, *.safetensors, *.npy, *.parquet), found {names}."
        )
    target = Path(tempfile.mkdtemp(prefix="csdiff-upload-"))
    for file in kept:
        shard = SHARD.match(file.name)
        folder = target / shard["folder"] if shard else target
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    return target
