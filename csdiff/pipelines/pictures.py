"""Writing pictures: a PNG with a JSON beside it, and a grid of them all."""

import json
import os
import re
import tempfile
from math import ceil, sqrt
from pathlib import Path

from PIL import Image

from csdiff.errors import CSDiffError


def check_output_folder(output: str | os.PathLike) -> Path:
    """Refuses a folder that could not be written, without making it.

    Raises:
        CSDiffError: it is a file, or it or its nearest existing parent is not a writable folder.
    """
    folder = Path(output)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise CSDiffError(f"output: expected a folder, found the file {existing}; give another --output.")
    try:
        # permission bits do not tell of read-only disks and special folders
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise CSDiffError(
            f"output: {folder} cannot be written ({error.strerror} in {existing}); give another --output."
        ) from error
    return folder


def write_picture(folder: Path, name: str, image: Image.Image, record: dict) -> Path:
    """Writes `name.png` and `name.json`, each whole or not at all.

    A picture of the same name is replaced only if it was made from the same record; otherwise the new one is called
    `name-2`, `name-3`, ...

    Returns:
        Path of the PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    path = folder / f"{name}.png"
    count = 1
    while path.exists() and not _same_text(path.with_suffix(".json"), text):
        count += 1
        path = folder / f"{name}-{count}.png"
    _write_whole(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    try:
        _write_whole(path, lambda file: image.save(file, format="PNG"))
    except BaseException:
        if not path.exists():
            path.with_suffix(".json").unlink()
        raise
    return path


def write_grid(folder: Path, images: list[Image.Image], columns: int | None = None) -> Path:
    """Writes `grid.png`: the pictures row by row, `columns` a row (a square by default).

    Returns:
        Path of the PNG.
    """
    columns = columns or ceil(sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    path = folder / "grid.png"
    _write_whole(path, lambda file: sheet.save(file, format="PNG"))
    return path


def picture_name(prompt: str, seed: int) -> str:
    """A file name that says what is in it: `a-red-apple-3d-style-0`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return f"{words[:60].strip('-_') or 'picture'}-{seed}"


def _same_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _write_whole(path: Path, write):
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        # mkstemp makes files for the owner alone; give them the usual permissions
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
