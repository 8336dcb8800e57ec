"""Uploads that are looked at before they are decoded, and PNGs that say how they arose."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.errors import CSDiffError
from csdiff.pipelines.pictures import picture_name

MOST_PIXELS = 50_000_000
LARGEST_SIDE = 1024


def read_upload(path: str | os.PathLike | None) -> Image.Image:
    """An uploaded picture, upright, in RGB, at most 1024 pixels a side.

    Raises:
        CSDiffError: nothing uploaded, no picture, or one whose decoding would take too much memory.
    """
    if path is None:
        raise CSDiffError("Expected a picture, found none; drop one into the field, or use a prompt.")
    name = Path(path).name
    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise CSDiffError(f"{name} has too many pixels; make it smaller, {LARGEST_SIDE} a side are enough.") from error
    except Exception as error:
        raise CSDiffError(f"{name} cannot be read as a picture; use PNG, JPEG, WebP or GIF.") from error
    if width * height > MOST_PIXELS:
        raise CSDiffError(
            f"{name} has {width} x {height} pixels, expected at most {MOST_PIXELS // 1_000_000} million; make it "
            f"smaller, {LARGEST_SIDE} a side are enough."
        )
    try:
        picture = decode_image(Path(path))
    except UnreadableImage as error:
        raise CSDiffError(f"{name} is damaged or not whole; save or upload it again.") from error
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return picture


def write_png(folder: Path, image: Image.Image, prompt: str, seed: int, record: dict, suffix: str = "") -> str:
    """Writes a picture with `record` in its PNG text, under a name that says what it is; returns the path."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("csdiff", json.dumps(record, ensure_ascii=False))
    path = folder / f"{picture_name(prompt, seed)}{suffix}.png"
    image.save(path, pnginfo=text)
    return str(path)
