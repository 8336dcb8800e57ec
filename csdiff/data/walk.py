"""The one walk over a folder: what is visible in it, in order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# What systems leave beside files; names that begin with a dot (`._a.png`, `.ipynb_checkpoints`) are hidden anyway.
_LITTER = {"__macosx", "thumbs.db", "desktop.ini"}
_SHOWN = 5


def hidden(name: str) -> bool:
    """Whether any part of a relative name is hidden, or litter of a system."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in PurePosixPath(name).parts)


def visible_files(folder: Path) -> list[str]:
    """Names, relative and with `/`, of the files below a folder, in the order of their names.

    Links are followed; a folder that has been seen under another name is not entered again, so no loop has an end.
    """
    names, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not hidden(name))
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files if not hidden(name)]
    return sorted(names)


def inside(folder: Path, name: str, allow_outside: bool) -> Path | None:
    """The place of a file that a table names, or None where it leads out of the folder.

    The name decides, not the disk: links in the folder are followed, they are how the hub's cache is laid out.
    """
    place = Path(os.path.normpath(folder / name))
    if not place.exists() and "\\" in name:  # Written on Windows.
        place = Path(os.path.normpath(folder / name.replace("\\", "/")))
    return place if allow_outside or place.is_relative_to(os.path.normpath(folder)) else None


def by_ending(names: Iterable[str]) -> dict[str, dict]:
    """How many files have each ending, the most frequent first, and the first of their names."""
    names = list(names)
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    listed: dict[str, list[str]] = {ending: [] for ending, _ in endings.most_common()}
    for name in names:
        first = listed[PurePosixPath(name).suffix.lower() or "no ending"]
        if len(first) < _SHOWN:
            first.append(name)
    return {ending: {"count": endings[ending], "first": first} for ending, first in listed.items()}
