"""Text from files: which encoding, and where a line ends."""

from __future__ import annotations

import codecs
from pathlib import Path

# UTF-16's mark begins as UTF-32's.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class UnreadableText(ValueError):
    """Bytes that are not text in a known encoding; the message says where, and what to do."""


def decode_text(content: bytes) -> str:
    r"""Text in UTF-8, or in UTF-16 or UTF-32 where the file says so by its mark or by its zero bytes.

    Lines end with `\n`; `\r\n` becomes it, and `\r` where a text has nothing else. Other encodings are not guessed:
    what decodes as Windows-1252 may be anything.

    Raises:
        UnreadableText: with the line and the cure.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    start = content[:1000]
    if encoding == "utf-8" and start.count(0) > len(start) / 4:
        # ASCII in UTF-16 has a zero in every second byte.
        encoding = "utf-16-be" if start[::2].count(0) > start[1::2].count(0) else "utf-16-le"
    try:
        text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableText(
            f"line {line}: expected {encoding.upper()}, found the byte 0x{content[error.start]:02x}; save it as UTF-8 "
            "(Excel: CSV UTF-8; or iconv -f WINDOWS-1252 -t UTF-8, if that is what it is)"
        ) from error
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def read_text(path: Path) -> str:
    """Text of a file, see `decode_text`."""
    return decode_text(path.read_bytes())


def lines(text: str) -> list[str]:
    """Lines of a text, without an empty one after the last newline; no other character ends one."""
    return text.removesuffix("\n").split("\n") if text else []
