"""Files and folders: written whole or not at all, locked, and read with errors that name them.

Nothing here executes what it reads: JSON and safetensors headers only. No model library is imported.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from csdiff.errors import CSDiffError

PARTIAL = ".partial-"
# Files that can run code when they are loaded, and so never are.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TYPE_NAMES = {dict: "an object", str: "a string", int: "a whole number", bool: "true or false"}
# No space, quota used up, file larger than the process may write.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def absolute(place: str | os.PathLike) -> Path:
    """The one name of a place: absolute, `~` and `..` and links resolved. Call it once, where a name comes in."""
    return Path(place).expanduser().resolve()


def fsync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        # Some file systems cannot flush a folder (network shares, mounted cloud drives).
        if not path.is_dir():
            raise


def move(source: Path, target: Path) -> None:
    """Rename in one step and make the new name durable."""
    source.replace(target)
    fsync(target.parent)


@contextmanager
def writing(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write aside; at the end it is flushed to the disk and gets its name. An error leaves nothing."""
    aside = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with aside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text)


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Write JSON as a whole, in the order of its keys as given."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def writing_folder(
    target: Path, stale: Callable[[str], bool] = lambda name: True, whole: bool = False
) -> Iterator[Path]:
    """A fresh folder to fill; at the end its files are flushed to the disk and moved into place.

    A new folder appears by one rename. In a folder that exists each entry is replaced by one rename, `*.safetensors`
    (and their index) of an earlier save that the new one lacks are removed, and files of others stay. What
    killed processes left of earlier tries is removed first.

    Args:
        target: The folder.
        stale: Which of the earlier weights' names the new save stands in for; by default all.
        whole: Replace a folder that exists as a whole: nothing of it stays.
    """
    fresh = whole or not target.exists()
    parent = target.parent if fresh else target
    parent.mkdir(parents=True, exist_ok=True)
    remove_partial(parent, target.name)
    aside = parent / f"{PARTIAL}{os.getpid()}-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        readers = aside.stat().st_mode & 0o444
        for path in (aside, *aside.rglob("*")):
            # safetensors makes files that their owner alone may read; whoever may read the folder may read them.
            with suppress(OSError):
                path.chmod(path.stat().st_mode | readers)
            fsync(path)
        if whole and target.exists():
            replaced = parent / f"{PARTIAL}{os.getpid()}-replaced-{target.name}"
            target.rename(replaced)
            aside.rename(target)
            shutil.rmtree(replaced)
        elif fresh:
            aside.rename(target)
        else:
            _replace_entries(aside, target, stale)
        fsync(parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_entries(aside: Path, target: Path, stale: Callable[[str], bool]) -> None:
    written = {entry.name for entry in aside.iterdir()}
    for entry in sorted(aside.iterdir()):
        if entry.is_dir() and (target / entry.name).is_dir():
            shutil.rmtree(target / entry.name)
        entry.replace(target / entry.name)
    for entry in target.iterdir():
        weights = entry.suffix == ".safetensors" or ".safetensors.index." in entry.name
        if weights and entry.is_file() and entry.name not in written and stale(entry.name):
            entry.unlink()


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in a folder, of a name or all; what a living one writes stays."""
    import psutil

    for path in [path for path in folder.glob(f"{PARTIAL}*") if path.name.endswith(name)]:
        process = path.name.removeprefix(PARTIAL).partition("-")[0]
        if process.isdigit() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Keeps a second process from writing `what` into a folder, by its file `.lock`; that of a dead process is none.

    Raises:
        CSDiffError: if another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise CSDiffError(f"{folder}: another process is writing {what} there; wait for it or stop it.") from None
    except OSError:  # A file system without locks.
        pass
    try:
        yield
    finally:
        # While it is held: whoever opened it meanwhile sees that its name has gone.
        with suppress(OSError):
            (folder / ".lock").unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the `folder_lock` of a folder; nothing in it changes."""
    from filelock import FileLock, Timeout

    try:
        if (folder / ".lock").exists():
            with FileLock(folder / ".lock", blocking=False, thread_local=False):
                pass
    except Timeout:
        return True
    except OSError:  # A file system without locks, or the file of somebody else.
        pass
    return False


def disk_full(error: BaseException) -> bool:
    """Whether an error, or the one it came from, says that no more can be written."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors reports the operating system's message inside its own exception.
    if type(error).__name__ == "SafetensorError" and any(f"os error {code})" in str(error) for code in _FULL):
        return True
    return error.__cause__ is not None and disk_full(error.__cause__)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CSDiffError if there is no such file, or if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CSDiffError(f"{path}: expected a JSON file, found none.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CSDiffError(f"{path}: expected JSON, found a file that cannot be read as such ({error}).") from error
    if not isinstance(content, dict):
        raise CSDiffError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
    return content


def check_types(file: Path, content: dict[str, Any], types: dict[str, type], cure: str) -> None:
    """CSDiffError for the first entry of a JSON object that is known and of another type.

    Entries are named with dots, an object before what is in it; null and absent ones are not known.
    """
    for name, expected in types.items():
        value: Any = content
        for key in name.split("."):
            value = None if value is None else value.get(key)
        if value is not None and type(value) is not expected:
            raise CSDiffError(f"{file}: {name}: expected {_TYPE_NAMES[expected]}, found {value!r:.60}; {cure}.")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line that a killed process cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (F32, F16, ...) and shape of every tensor of a file, no tensor is read; CSDiffError if it is none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CSDiffError(f"{path}: expected a safetensors file, found none.")
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CSDiffError(
            f"{path}: expected a whole safetensors file, found one cut short, damaged or of another kind ({error}); "
            "copy it again (a pickle can run code and is never loaded)."
        ) from error


def plain(value: object) -> object:
    """Dataclasses, paths, arrays and tensors as what JSON has; null stands for numbers that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # numpy scalars and arrays, torch tensors
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
