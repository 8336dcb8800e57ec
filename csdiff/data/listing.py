"""Which files of a folder are read: what is visible, what lies inside, and what belongs to a split."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path, PurePosixPath
from typing import NoReturn

from csdiff.data.items import Problem, SourceOptions, printable
from csdiff.errors import CSDiffError

# What systems leave beside files; names that begin with a dot (`._a.png`, `.ipynb_checkpoints`) are hidden anyway.
_LITTER = {"__macosx", "thumbs.db", "desktop.ini"}
# As the hub names the shards of a split.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


def hidden(name: str) -> bool:
    """Whether any part of a relative name is hidden, or litter of a system."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in PurePosixPath(name).parts)


def visible_files(folder: Path) -> list[str]:
    """Names, relative and with `/`, of the files below a folder, sorted; links are followed, once each."""
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


def place_of(folder: Path, name: str) -> Path:
    """Where a file is that a table in a folder names."""
    place = Path(os.path.normpath(folder / name))
    if not place.exists() and "\\" in name:  # Written on Windows.
        place = Path(os.path.normpath(folder / name.replace("\\", "/")))
    return place


def image_file(id: str, name: str, folders: Sequence[Path], allow_outside: bool) -> Path | Problem:
    """The image of an item, by its name below one of the folders; the name may not lead out of them, links may."""
    places = [place_of(folder, name) for folder in folders]
    if not allow_outside:
        kept = zip(places, folders, strict=True)
        places = [place for place, folder in kept if place.is_relative_to(os.path.normpath(folder))]
    if not places:
        detail = f"{printable(name)} leads out of {folders[0]}; --allow_outside true reads it, if you trust it"
        return Problem(id, "outside_image", detail)
    found = next(filter(Path.is_file, places), None)
    return found or Problem(id, "missing_image", f"no such file: {printable(str(places[0]))}")


def suffix_of(name: str) -> str:
    """Ending of a file name, in lower case and with its dot."""
    return PurePosixPath(name).suffix.lower()


def by_ending(names: Iterable[str]) -> dict[str, dict]:
    """How many files have each ending, the most frequent first, and the first of their names."""
    names = [printable(name) for name in names]
    endings = [suffix_of(name) or "no ending" for name in names]
    return {
        ending: {"count": count, "first": [n for n, e in zip(names, endings, strict=True) if e == ending][:5]}
        for ending, count in Counter(endings).most_common()
    }


def data_files(folder: Path, names: Sequence[str], options: SourceOptions) -> list[str]:
    """Those of a folder's files that belong to a split, all where none names one; refuses a split that is not there.

    The README of a hub data set declares the splits, else `train`, `test`, ... in the names do. `options.subset` is a
    configuration of the README, or a folder.
    """
    splits = _declared(folder, names, options.subset)
    if splits is None:
        within = f"{options.subset}/" if options.subset else ""
        names = [name for name in names if name.startswith(within)]
        splits = {}
        for name in names:
            splits.setdefault(_split_of(name), []).append(name)
        if splits.keys() <= {None}:
            return sorted(names)
        splits.pop(None, None)
    options.splits.update(splits)
    if options.split == "all":
        return sorted({file for files in splits.values() for file in files})
    return _choose(folder, splits, options.split)


def split_folders(folder: Path, content: Sequence[str], names: Sequence[str], options: SourceOptions) -> list[str]:
    """Names of the files in the folder of a split, where nothing but such folders has images or tables; else all."""
    # data/train/a.png as well as train/a.png
    base = "data/" if all(name.startswith("data/") for name in content) else ""
    tops = sorted({name.removeprefix(base).partition("/")[0] for name in content})
    if not tops or not all(map(_keyword, tops)):
        return list(names)
    options.splits.update(tops)
    if options.split == "all":
        return list(names)
    return _choose(folder, {top: [n for n in names if n.startswith(f"{base}{top}/")] for top in tops}, options.split)


def _choose(where: Path, splits: dict[str, list[str]], split: str) -> list[str]:
    """Files of a split, by its name or by another word of the hub for it ("val", "validation")."""
    wanted = _keyword(split) or split
    chosen = {file for name, files in splits.items() if (_keyword(name) or name) == wanted for file in files}
    return sorted(chosen) or no_split(where, split, splits)


def no_split(where: object, split: str, found: Iterable[str]) -> NoReturn:
    """Refuse a split that is not there."""
    raise CSDiffError(f"{where}: expected the split {split!r}, found {', '.join(found)}; choose one with split.")


def _keyword(name: str) -> str | None:
    from datasets.data_files import SPLIT_KEYWORDS

    return next((str(split) for split, words in SPLIT_KEYWORDS.items() if name.lower() in words), None)


def _split_of(name: str) -> str | None:
    path = PurePosixPath(name)
    if shard := _SHARD.fullmatch(path.name):
        return shard[1]
    # The words that data sets on the hub are told by, in the file's name or in those of its folders.
    words = [*re.split(r"[-._ 0-9]", path.name), *re.split(r"[-._ 0-9/]", str(path.parent))]
    return next(filter(None, map(_keyword, words)), None)


def _declared(folder: Path, names: Sequence[str], subset: str | None) -> dict[str, list[str]] | None:
    """Files of each split, by the README of a hub data set; None where it declares nothing."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not (folder / "README.md").is_file():
        return None
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(folder / "README.md").data)
    except Exception:  # A README without, or with another, block of YAML is not our concern.
        return None
    if not configs:
        return None
    subset = subset or (next(iter(configs)) if len(configs) == 1 else configs.get_default_config_name())
    if subset not in configs:
        known = ", ".join(configs)
        raise CSDiffError(f"{folder}: expected a subset, one of {known}, found {subset!r}; name it with subset.")
    files = configs[subset].get("data_files")
    # What a pattern finds is among the names of the folder: none leads out of it.
    if files is None:
        return None
    found = {}
    for split, patterns in sanitize_patterns(files).items():
        # Not that of a path, which refuses patterns that lead out of the folder.
        there = {n for pattern in patterns for n in glob(pattern, root_dir=folder, recursive=True)}  # noqa: PTH207
        found[split] = [name for name in names if name in there]
    return found
