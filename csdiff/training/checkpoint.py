"""Checkpoints that are whole or absent: written aside, synced to disk, renamed into place."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from csdiff.errors import CSDiffError

_STEP = re.compile(r"step-(\d+)")
_PARTIAL = ".partial-"
# No space, quota used up, file larger than the process may write.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Checkpoints:
    """The checkpoint folder of a run: `step-00000100/`, ..., with the links `latest` and `best`.

    Args:
        folder: `OUTPUT_DIR/checkpoints`.
        keep: Newest checkpoints to keep beside the best one; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending; what was being written when a run died is not among them."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """Newest whole checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, write: Callable[[Path], None], size: int, best: int | None) -> Path:
        """Write a checkpoint atomically, move the links, drop what retention no longer keeps.

        Args:
            step: Updates done.
            write: Fills an empty folder.
            size: Bytes it will take, for the message when the disk is full.
            best: Step of the best checkpoint so far; kept, and linked as `best`.

        Raises:
            CSDiffError: if the disk is full; nothing of the new checkpoint remains and the older ones are intact.
        """
        target = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_folder(target, write)
        except Exception as error:
            if not disk_full(error):
                raise
            what = f"checkpoint {target.name} needs about {size / 1e6:.1f} MB in {self.folder}"
            raise CSDiffError(self.full_message(what)) from error
        self._link("latest", step)
        if best is not None and self.path(best).is_dir():
            self._link("best", best)
        self._prune(best)
        return target

    def clean(self) -> None:
        """Remove what killed runs left half-written."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _prune(self, best: int | None) -> None:
        if self.keep:
            for step in self.steps()[: -self.keep]:
                if step != best:
                    shutil.rmtree(self.path(step))

    def _link(self, name: str, step: int) -> None:
        aside = self.folder / f"{_PARTIAL}{name}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(self.path(step).name, target_is_directory=True)
        aside.replace(self.folder / name)

    def full_message(self, what: str) -> str:
        """One sentence for a full disk.

        Args:
            what: What could not be written, and where.
        """
        last = self.latest()
        kept = f"the last checkpoint, {last}, is intact" if last else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.folder.parent).free
        return (
            f"The disk is full: {what} and {free / 1e6:.1f} MB could be used; {kept}. Free some space and run the "
            "same command again to continue."
        )


def disk_full(error: BaseException) -> bool:
    """Whether an error, or the one it came from, says that no more can be written."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors reports the operating system's message inside its own exception.
    if type(error).__name__ == "SafetensorError" and any(f"os error {code})" in str(error) for code in _FULL):
        return True
    return error.__cause__ is not None and disk_full(error.__cause__)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder next to `target`, sync it to disk and rename it; on an error `target` is as it was."""
    aside = target.with_name(f"{_PARTIAL}{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        sync_folder(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if target.exists():
        replaced = target.with_name(f"{_PARTIAL}replaced-{target.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        aside.rename(target)
        shutil.rmtree(replaced)
    else:
        aside.rename(target)
    _sync(target.parent)


def write_file(target: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(target, lambda aside: aside.write_text(text, encoding="utf-8"))


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file next to `target`, sync it to disk and rename it."""
    aside = target.with_name(f"{_PARTIAL}{target.name}")
    write(aside)
    _sync(aside)
    aside.replace(target)
    _sync(target.parent)


def write_json(target: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    write_file(target, json.dumps(content, indent=2, sort_keys=True) + "\n")


def sync_folder(folder: Path) -> None:
    """Force every file below a folder, and the folders themselves, onto the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
