"""Writing images: a PNG that holds its settings, a JSON of them beside it, and a grid of all images."""

from __future__ import annotations

import json
import os
import re
import tempfile
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from csdiff.errors import CSDiffError
from csdiff.files import write_json, writing

SETTINGS = "csdiff"
"""Keyword of the PNG's text chunk."""


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
        # Permission bits do not tell of read-only disks and special folders.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise CSDiffError(
            f"output: {folder} cannot be written ({error.strerror} in {existing}); give another --output."
        ) from error
    return folder


def write_picture(folder: Path, name: str, image: Image.Image, settings: dict[str, Any]) -> Path:
    """Writes `name.png`, which holds its settings as text, and the same settings as `name.json`, each whole or not.

    An image of the same name is replaced only if it was made with the same settings; otherwise the new one is called
    `name-2`, `name-3`, ...

    Returns:
        Path of the PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In ASCII, so that it becomes a tEXt chunk, which every program shows.
    text, inside = json.dumps(settings), PngInfo()
    inside.add_text(SETTINGS, text)
    path, count = folder / f"{name}.png", 1
    while path.exists() and _text_of(path) != text:
        count += 1
        path = folder / f"{name}-{count}.png"
    # First the image: a JSON alone would say that there is one.
    with writing(path, "wb") as file:
        image.save(file, format="PNG", pnginfo=inside)
    write_json(path.with_suffix(".json"), settings)
    return path


def read_settings(png: str | os.PathLike | Image.Image) -> dict[str, Any]:
    """The settings with which an image was drawn, from the PNG itself.

    Raises:
        CSDiffError: no image there, or one that was not drawn by csdiff.
    """
    text = png.info.get(SETTINGS) if isinstance(png, Image.Image) else _text_of(Path(png))
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        where = "the image" if isinstance(png, Image.Image) else png
        raise CSDiffError(f"Expected a PNG that csdiff drew, with its text kept, found no settings in {where}.")
    return settings


def write_grid(folder: Path, images: list[Image.Image], columns: int | None = None) -> Path:
    """Writes `grid.png`: the images row by row, `columns` a row (a square by default).

    Returns:
        Path of the PNG.
    """
    columns = columns or ceil(sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    path = folder / "grid.png"
    with writing(path, "wb") as file:
        sheet.save(file, format="PNG")
    return path


def picture_name(prompt: str, seed: int) -> str:
    """A file name that says what is in it: `a-red-apple-3d-style-0`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return f"{words[:60].strip('-_') or 'image'}-{seed}"


def _text_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get(SETTINGS)
    except (OSError, ValueError, SyntaxError):
        return None
