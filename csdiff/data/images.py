"""Which files are images, and decoding them: one rule for each mode."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

DECODING = "2: RGB, first frame, upright by EXIF, transparency on white, high byte of deeper integers, floats 0 to 1"
"""What is done to an image before the encoder's own processor. Part of the fingerprint of a store: a rule that changes
pixels changes this text."""

MAX_PIXELS = 120_000_000
"""Images of more pixels are not decoded; a photograph of 108 megapixels is."""
MAX_ASPECT = 100
"""Images longer than this many times their width are not decoded: resized by the short side they fill memory."""

# Formats that Pillow only recognises, or hands to a program of its own (PostScript).
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns about metadata and palettes of images that do decode. For every thread, hence not in a context.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why."""


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_DECODED)


@cache
def _endings() -> frozenset[str]:
    formats = set(_formats())
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def is_image_name(name: str) -> bool:
    """Whether a file name ends as that of an image that Pillow opens here."""
    return Path(name).suffix.lower() in _endings()


def is_image_content(path: Path) -> bool:
    """Whether a file begins as an image, whatever it is called."""
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Exception:  # Anything can stand in a file that only looks like an image.
        return False


def decode_image(image: bytes | Path) -> Image.Image:
    """Decode an image completely to upright 8-bit RGB.

    Of an animation or a file of several pages the first frame, turned as its EXIF orientation says. By mode:

    - 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV, LAB: as Pillow converts them to RGB (LAB as D50, by its profiles);
    - LA, La, PA, RGBA, RGBa, and a transparent colour of any other: composited on white;
    - I;16 in either byte order: the high byte, as Pillow reads 16-bit colour;
    - I (32-bit): the high byte of the smallest of 8, 16 and 31 bits that holds the largest value; negative values are
      refused;
    - F: 0 to 1 times 255; values above 16 and up to 255 as they are; other ranges, NaN and infinity are refused.

    Args:
        image: Encoded bytes, or a file.

    Raises:
        UnreadableImage: It is missing, empty, truncated, in no known format, of values without a known range, of more
            than `MAX_PIXELS` pixels, or longer than `MAX_ASPECT` times its width.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as opened:
            _check_size(*opened.size)
            deep = "16" in str(opened.tile)
            opened.load()
            # Some formats turn, or know their size, only when they load.
            _check_size(*opened.size)
            turn = None
            with suppress(Exception):  # Damaged EXIF of an image that does decode.
                turn = _TURNS.get(opened.getexif().get(0x0112))
            rgb = _to_rgb(opened, deep)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"it has too many pixels, at most {MAX_PIXELS:,} are decoded ({error})") from error
    except Exception as error:  # Damaged files make Pillow's decoders raise almost anything.
        # Without the address of bytes in memory, so that a report is the same on every run.
        raise UnreadableImage(f"{type(error).__name__}: {re.sub(' <.* at 0x.*?>', '', str(error))}") from error
    return rgb if turn is None else rgb.transpose(turn)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(
            f"it has {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} and sides of 1 to {MAX_ASPECT} are decoded"
        )


def _to_rgb(image: Image.Image, deep: bool = False) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray((_integers if image.mode == "I" else _floats)(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if deep and isinstance(transparent, tuple):
        # Pillow reads the high bytes of 16-bit colour, but both of the transparent one.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if transparent is None and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _integers(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise UnreadableImage(f"its integers go from {low:,} to {high:,}; save it with 8 or 16 bits, none negative")
    bits = next(bits for bits in (8, 16, 31) if high < 2**bits)
    return (values >> (bits - 8)).astype(np.uint8)


def _floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    # A little over and under is what resampling leaves. NaN is in neither range.
    if low >= -0.01 and high <= 1.01:
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    if low >= 0 and 16 < high <= 255:
        return np.rint(values).astype(np.uint8)
    raise UnreadableImage(f"its floats go from {low:g} to {high:g}, expected 0 to 1 or 0 to 255; save it with 8 bits")
