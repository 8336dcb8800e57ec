"""What a source gives: a captioned image, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One image with its captions, one image alone, or one entry of captions alone.

    Attributes:
        id: Unique within the source and the same on every run.
        captions: As they stand in the source; may be empty, and may hold empty strings.
        image: The encoded image (its bytes, or the file they are in), or None.
        path: Name of the image in the source, for people; None if it has none.
        extra: Further columns asked for, by name.
    """

    id: str
    captions: list[str]
    image: bytes | Path | None = None
    path: str | None = None
    extra: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something of the source that had to be left out.

    Attributes:
        id: Of the item, file or archive.
        reason: One of `REASONS`.
        detail: What exactly was found.
    """

    id: str
    reason: str
    detail: str = ""


REASONS = {
    "unreadable_image": "the image cannot be decoded",
    "missing_image": "there is no such file, or no image in the entry",
    "no_caption": "an image without any caption",
    "empty_caption": "a caption of nothing but white space",
    "long_caption": "a caption of more tokens than the text encoder takes",
    "unreadable_archive": "an archive that ends early or is damaged",
}


def caption_list(value: object) -> list[str]:
    """Captions of one entry from whatever stands in its caption field: a string, several, or nothing."""
    if value is None or value != value:  # NaN stands for an empty cell.
        return []
    if isinstance(value, (list, tuple)):
        return [caption for part in value for caption in (caption_list(part) or [""])]
    return [value if isinstance(value, str) else str(value)]
