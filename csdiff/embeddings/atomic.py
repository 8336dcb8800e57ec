"""Files that are there as a whole or not at all, whatever happens in between."""

from __future__ import annotations

import json
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename in one step and make the new name durable."""
    source.replace(target)
    fsync(target.parent)


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write JSON aside, flush it to the disk, and give it its name."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    move(aside, path)
