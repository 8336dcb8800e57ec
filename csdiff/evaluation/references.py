"""Reference pictures and the prompts that go with them, read one batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.errors import CSDiffError
from csdiff.evaluation.extractors import Extractor

_UNIT = 256


@dataclass
class References:
    """A source of captioned pictures.

    Attributes:
        source: Path or id.
        captions: First caption of each picture that has one; pictures are decoded by :meth:`extract` only.
        features: `(M, D)` features of the pictures, by the name of the extractor; filled by :meth:`extract`.
        split: Of a source that has several.
        thumbnails: The pictures at the places asked for.
        sha256: Hash of captions and pixels; known after :meth:`extract`.
    """

    source: str
    split: str = "test"
    captions: list[str] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    thumbnails: dict[int, Image.Image] = field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def open(cls, source: str, split: str, option: str) -> References:
        """Read the captions.

        Raises:
            CSDiffError: no captions with pictures there, or too few.
        """
        references = cls(source, split)
        references.captions = [item.captions[0] for item in references._items(option)]
        if len(references.captions) < 4:
            raise CSDiffError(
                f"--{option} {source}: expected at least 4 pictures with captions, found {len(references.captions)}."
            )
        return references

    def extract(self, extractors: dict[str, Extractor], shown: list[int], batch_size: int, progress: bool) -> None:
        """Features of every picture, and the pictures at the places `shown`."""
        from tqdm import tqdm

        parts: dict[str, list[Tensor]] = {name: [] for name in extractors}
        digest = hashlib.sha256()
        pictures: list[Image.Image] = []

        def flush() -> None:
            for name, extractor in extractors.items():
                parts[name].append(extractor(pictures))
            bar.update(len(pictures))
            pictures.clear()

        with tqdm(total=len(self.captions), desc="reference pictures", disable=not progress) as bar:
            for place, item in enumerate(self._items("pictures")):
                try:
                    picture = decode_image(item.image)
                except UnreadableImage as error:
                    raise CSDiffError(
                        f"--pictures {self.source}: the picture {item.id} cannot be decoded ({error}); remove it."
                    ) from error
                digest.update(item.captions[0].encode() + np.asarray(picture).tobytes())
                if place in shown:
                    self.thumbnails[place] = picture
                pictures.append(picture)
                if len(pictures) == batch_size:
                    flush()
            if pictures:
                flush()
        self.features = {name: torch.cat(values) for name, values in parts.items()}
        self.sha256 = digest.hexdigest()

    def _items(self, option: str) -> Iterator[Item]:
        source = open_source(self.source, split=self.split)
        if not (source.has_images and source.has_captions):
            raise CSDiffError(f"--{option} {self.source}: expected pictures with captions, found only one of the two.")
        for unit in range(source.units(_UNIT)):
            for item in source.read(unit, _UNIT):
                if isinstance(item, Item) and item.image is not None and item.captions and item.captions[0].strip():
                    yield item


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file, one a line.

    Raises:
        CSDiffError: it cannot be read or holds fewer than two.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CSDiffError(
            f"--prompts: expected a text file with one prompt a line, cannot read {path} ({reason})."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < 2:
        raise CSDiffError(f"--prompts {path}: expected at least 2 prompts, found {len(prompts)}.")
    return prompts
