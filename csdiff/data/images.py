"""Decoding of images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
# Stands in the preprocessing part of a fingerprint: what is done to an image before the encoder's own processor.
DECODING = {"exif_orientation": "applied", "mode": "RGB", "frame": "first"}


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why."""


def decode_image(image: bytes | Path) -> Image.Image:
    """Decode an image completely, turn it upright by its EXIF orientation, and convert it to RGB.

    Transparency is dropped as `Image.convert("RGB")` drops it, the way CLIP's image processors do.

    Raises:
        UnreadableImage: It is missing, empty, truncated, or in no known format.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's warnings are about metadata and palettes of a picture that does decode.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Damaged files make Pillow's decoders raise almost anything.
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
