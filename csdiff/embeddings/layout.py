"""Names of the folders and files of an embedding store (the clip-retrieval layout and what csdiff adds to it)."""

from __future__ import annotations

import re
from pathlib import Path

from csdiff.kinds import is_store  # noqa: F401  one of the questions about a store

FINGERPRINT_FILE = "csdiff.json"
REPORT_FILE = "report.json"
# Work in progress of `csdiff embed`; its presence without a csdiff.json means that the store is not complete.
PARTIAL_FOLDER = ".partial"

METADATA_FOLDER = "metadata"
# Key of `EmbeddingStore.read` -> (folder, stem of the shard files). The first two are clip-retrieval's own.
ARRAY_FOLDERS = {
    "text_embeds": ("text_emb", "text_emb"),
    "image_embeds": ("img_emb", "img_emb"),
    "text_states": ("text_states", "text_states"),
    "text_mask": ("text_mask", "text_mask"),
    "image_tokens": ("image_tokens", "image_tokens"),
}


def find_shards(folder: Path, stem: str, suffix: str) -> dict[int, Path]:
    """Shard files `{stem}_{number}.{suffix}` of a folder by number, in numeric order; empty without the folder."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)\.{re.escape(suffix)}")
    names = [(pattern.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return dict(sorted((int(match[1]), path) for match, path in names if match))
