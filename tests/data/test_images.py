"""Decoding: the right pixels of every mode, and a reason for what is not decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from csdiff.data.images import MAX_PIXELS, UnreadableImage, _to_rgb, decode_image

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(rows, colour, bits=16, transparent=b"", size=None):
    """A PNG written by hand: modes that Pillow reads and does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = size or rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    trns = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + trns + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey(content):
    decoded = np.asarray(decode_image(content))
    assert decoded.dtype == np.uint8
    assert (decoded == decoded[..., :1]).all()
    return decoded[..., 0]


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(RAMP), "PNG"),
        saved(Image.fromarray(RAMP), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.int32) * 32767), "TIFF"),
        saved(Image.fromarray((RAMP >> 8).astype(np.int32)), "TIFF"),
        saved(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        saved(Image.fromarray((RAMP / 257).astype(np.float32)), "TIFF"),
        b"P5\n64 8\n65535\n" + RAMP.astype(">u2").tobytes(),
        png(RAMP[..., None].repeat(3, 2), colour=2),
        png(np.stack([*[RAMP] * 3, np.full_like(RAMP, 65535)], 2), colour=6),
    ],
    ids=["I;16", "I;16 TIFF", "I of 16 bits", "I of 31 bits", "I of 8 bits", "F 0-1", "F 0-255", "PGM", "RGB", "RGBA"],
)
def test_deep_grey_ramps_stay_ramps(content):
    decoded = grey(content).astype(int)
    assert np.abs(decoded - (RAMP >> 8)).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, np.nan], "nan"),
        ([-5.0, 90.0], "-5 to 90"),
        ([0.0, 9.0], "0 to 9"),
        ([0.0, 4e5], "400000"),
        ([-3, 9], "-3"),
    ],
)
def test_numbers_of_no_known_range_are_refused(values, expected):
    dtype = np.int32 if isinstance(values[0], int) else np.float32
    with pytest.raises(UnreadableImage, match=expected):
        decode_image(saved(Image.fromarray(np.array([values], dtype)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "RGB;16", "L", "1"])
def test_what_is_hidden_under_transparency_is_white(mode):
    """A dark square on a transparent ground, whatever colour the ground hides."""
    square = np.zeros((16, 16), bool)
    square[4:12, 4:12] = True

    def made(hidden):
        values = np.where(square, 10, hidden).astype(np.uint8)
        alpha = np.where(square, 255, 0).astype(np.uint8)
        if mode in ("I;16", "RGB;16"):
            deep = np.where(square, 10 * 257, hidden * 257 + 1 - (hidden == 255)).astype(np.uint16)
            mark = struct.pack(">H", int(deep[0, 0]))
            return png(deep, 0, 16, mark) if mode == "I;16" else png(deep[..., None].repeat(3, 2), 2, 16, 3 * mark)
        if mode == "1":
            return saved(Image.fromarray(values > 99).convert("1"), "PNG", transparency=int(hidden > 99) * 255)
        image = Image.fromarray(np.stack([values, alpha], 2), "LA")
        if mode in ("P", "L"):
            return saved(Image.fromarray(values).convert(mode), "PNG", transparency=hidden)
        return saved(image.convert(mode), "PNG")

    for hidden in (0, 255):
        pixels = np.asarray(decode_image(made(hidden)))
        assert (pixels[~square] == 255).all()
        if mode != "1":
            assert (pixels[square] < 12).all()


def test_half_transparent_is_half_white():
    for mode in ("RGBA", "RGBa", "LA", "La"):
        image = Image.new("RGBA" if "R" in mode else "LA", (4, 4), (0, 0, 0, 128) if "R" in mode else (0, 128))
        assert np.asarray(_to_rgb(image.convert(mode))).flatten().tolist() == [127] * 48, mode
    palette = Image.new("PA", (4, 4))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putalpha(Image.new("L", (4, 4), 0))
    assert np.asarray(_to_rgb(palette)).min() == 255


def test_colour_spaces_become_rgb():
    from PIL import ImageCms

    colours = Image.new("RGB", (8, 8), (200, 60, 40))
    lab = ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(colours, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    for image in (colours.convert("CMYK"), lab):
        decoded = np.asarray(decode_image(saved(image, "TIFF"))).astype(int)
        assert np.abs(decoded - (200, 60, 40)).max() <= 3, image.mode


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(format, orientation):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    T = Image.Transpose
    stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
    stored |= {6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    image = upright if orientation == 1 else upright.transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(saved(image, format, exif=exif))
    assert decoded.size == (24, 16)
    assert decoded.getpixel((3, 3))[1] < 80 < 180 < min(decoded.getpixel((20, 12)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(saved(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert np.abs(np.asarray(decoded).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(np.zeros((1, 1), np.uint8), 0, 8, size=(13_000, 13_000)), "13,000 x 13,000"),
        (png(np.zeros((1, 1), np.uint8), 0, 8, size=(60_000, 60_000)), f"{MAX_PIXELS:,}"),
        (png(np.zeros((1, 1), np.uint8), 0, 8, size=(1, 9_000_000)), "9,000,000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (b"", "cannot identify"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify"),
        (saved(Image.effect_noise((64, 64), 90), "PNG")[:900], "Error"),
        (saved(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
    ],
    ids=["many pixels", "more", "long", "PostScript", "empty", "SVG", "half a PNG", "half a JPEG"],
)
def test_what_is_not_decoded_says_why(content, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for image in (content, tmp_path / "a.png"):
        with pytest.raises(UnreadableImage, match=reason) as error:
            decode_image(image)
        assert " at 0x" not in str(error.value)  # the report is the same on every run


def test_damaged_exif_does_not_cost_the_image():
    decode_image(saved(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"))
