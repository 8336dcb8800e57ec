"""Which files of a folder belong to a split, as the Hugging Face hub reads a data set that lies on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from csdiff.errors import CSDiffError

ALL = "all"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


def data_files(folder: Path, names: Sequence[str], split: str, subset: str | None = None) -> list[str]:
    """Files of a split: as the README of a hub data set declares them, else by `train`, `test`, ... in their names.

    Args:
        folder: Of the data set.
        names: Of the files that are asked about, relative to it.
        split: "train", "validation" (also val, valid, dev), "test", ...; "all" for every file.
        subset: Configuration that the README declares, or a folder.

    Returns:
        Some of the names; all of them where none names a split.

    Raises:
        CSDiffError: No such subset or split.
    """
    declared = _declared(folder, subset)
    if declared is not None:
        splits = {
            name: [file for pattern in patterns for file in _matching(folder, pattern) if file in set(names)]
            for name, patterns in declared.items()
        }
    else:
        if subset is not None:
            names = [name for name in names if name.startswith(f"{subset}/")]
        named: dict[str, list[str]] = {}
        for name in names:
            named.setdefault(_split_of(name) or "", []).append(name)
        splits = {name: files for name, files in named.items() if name}
        if not splits:
            return sorted(names)
    if split == ALL:
        return sorted({file for files in splits.values() for file in files})
    wanted = _split_of(split) or split
    chosen = [file for name, files in splits.items() if (_split_of(name) or name) == wanted for file in files]
    if not chosen:
        found = ", ".join(f"{name} ({len(files)} files)" for name, files in splits.items())
        where = f"{folder} (subset {subset})" if subset else folder
        raise CSDiffError(f"{where}: expected files of the split {split!r}, found {found}; choose one with split.")
    return sorted(set(chosen))


def split_folders(content: Sequence[str], names: Sequence[str], split: str) -> list[str]:
    """Names of the files in the folder of a split, where nothing but folders of splits has content; else all of them.

    Args:
        content: Names of images and tables.
        names: Of all files.
        split: "train", ...; "all" for every file.

    Raises:
        CSDiffError: There is no such split.
    """
    # data/train/a.png as well as train/a.png
    base = "data/" if all(name.startswith("data/") for name in content) else ""
    tops = dict.fromkeys(name.removeprefix(base).partition("/")[0] for name in content)
    if split == ALL or not content or not all(map(_keyword, tops)):
        return list(names)
    wanted = tuple(f"{base}{top}/" for top in tops if _keyword(top) == (_keyword(split) or split))
    if not wanted:
        raise CSDiffError(f"expected the split {split!r}, found {', '.join(tops)}; choose one with split.")
    return [name for name in names if name.startswith(wanted)]


def _keywords() -> dict[str, list[str]]:
    from datasets.data_files import SPLIT_KEYWORDS

    return {str(split): words for split, words in SPLIT_KEYWORDS.items()}


def _keyword(name: str) -> str | None:
    return next((split for split, words in _keywords().items() if name.lower() in words), None)


def _split_of(name: str) -> str | None:
    path = PurePosixPath(name)
    if shard := _SHARD.fullmatch(path.name):
        return shard[1]
    for text in (path.name, str(path.parent)):
        for split, words in _keywords().items():
            if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:$|[-._ 0-9/])", text, re.IGNORECASE):
                return split
    return None


def _matching(folder: Path, pattern: str) -> list[str]:
    try:
        return [path.relative_to(folder).as_posix() for path in folder.glob(pattern)]
    except (ValueError, NotImplementedError):  # An absolute pattern, or one that leads out.
        return []


def _declared(folder: Path, subset: str | None) -> dict[str, list[str]] | None:
    """Patterns of each split, from the README of a data set of the hub; None where it declares nothing."""
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
    name = subset or (next(iter(configs)) if len(configs) == 1 else configs.get_default_config_name())
    if name not in configs:
        found = f"found {subset!r}" if subset else "found none"
        raise CSDiffError(f"{folder}: expected a subset, one of {', '.join(configs)}, {found}; name it with subset.")
    files = configs[name].get("data_files")
    if files is None:
        return None
    if not isinstance(files, list) or not all(isinstance(part, dict) for part in files):
        files = [{"split": "train", "path": files}]
    return {str(p["split"]): [p["path"]] if isinstance(p["path"], str) else list(p["path"]) for p in files}
