"""From rows of a store to what the embedder takes: on its device, with the frozen encoders that are in the loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.loader import StoreBatches
from csdiff.embeddings.store import EmbeddingStore
from csdiff.embeddings.text_encoder import TextEncoder
from csdiff.embeddings.tokenizer import CaptionTokenizer
from csdiff.errors import CSDiffError
from csdiff.training.data import Pairs
from csdiff.training.gradient_cache import Rows

_CHUNK = 256


@dataclass
class Inputs:
    """Prepares batches.

    Attributes:
        device: Of the embedder.
        keys: Columns that are read, by group of rows.
        text_encoder: Frozen text encoder in the loop, or None.
        tokenize: For an adapter inside the text encoder, or None.
        image_encoder: Frozen image encoder whose projection maps image tokens, or None without a token-level term.
        images: Images by row for that encoder in the loop, or None where its tokens are cached.
        inside: Name of the text encoder that the adapter lives in, or None.
        states_shape: Tokens and width of the token states of text that are read, or None.
        project_text: Projection of token states by a frozen text encoder, where one is loaded.
    """

    device: str | torch.device
    keys: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "pairs": ("text_embeds", "image_embeds"),
            "unpaired_text": ("text_embeds",),
            "unpaired_image": ("image_embeds",),
        }
    )
    text_encoder: TextEncoder | None = None
    tokenize: CaptionTokenizer | None = None
    image_encoder: ImageEncoder | None = None
    images: "DatasetImages | None" = None
    inside: str | None = None
    states_shape: tuple[int, int] | None = None
    project_text: Callable[[Tensor], Tensor] | None = None

    @property
    def captions(self) -> bool:
        """Whether captions are read."""
        return self.text_encoder is not None or self.tokenize is not None

    def batches(
        self, group: str, pairs: Pairs, batch_size: int, seed: int = 0, place: tuple[int, int, int] = (0, 1, 0)
    ) -> Iterator[dict]:
        """Endless batches of one group: this process's part (`place`: rank, processes, first step) of them."""
        captions = self.captions and group != "unpaired_image"
        data = {"keys": self.keys[group], "captions": captions, "rows": pairs.rows, "groups": pairs.groups}
        return iter(StoreBatches(pairs.store, batch_size, seed, *place, **data))

    def prepare(self, batch: Rows) -> Rows:
        """Move every group to the device and encode what is not cached."""
        return {group: self._rows(rows, tokens=group == "pairs") for group, rows in batch.items()}

    def read(self, pairs: Pairs, block: int = 1024) -> list[dict]:
        """All rows of a set of pairs, prepared, in blocks; without tokens, which only the objective looks at."""
        blocks = []
        keys = tuple(key for key in self.keys["pairs"] if key != "image_tokens")
        for start in range(0, len(pairs), block):
            rows = pairs.rows[start : start + block]
            raw: dict = dict(pairs.store.read(rows, keys))
            if self.captions:
                raw["captions"] = pairs.store.captions(rows)
            blocks.append(self._rows(raw, tokens=False))
        return blocks

    def _rows(self, rows: dict, tokens: bool) -> dict:
        ready: dict[str, Tensor] = {
            name: value.to(self.device, non_blocking=True)
            for name, value in rows.items()
            if name not in ("index", "captions")
        }
        if "captions" in rows and self.tokenize is not None:
            ready["input_ids"], ready["text_mask"] = (t.to(self.device) for t in self.tokenize(rows["captions"]))
        if "captions" in rows and self.text_encoder is not None:
            parts = [self.text_encoder.encode(captions) for captions in _chunks(rows["captions"])]
            ready["text_embeds"] = torch.cat([part.embeds for part in parts]).float()
            ready["text_states"] = torch.cat([part.states for part in parts]).float()
            ready["text_mask"] = torch.cat([part.mask for part in parts])
        if tokens and self.image_encoder is not None:
            ready["image_tokens"] = self._image_tokens(rows, ready)
        return ready

    @torch.no_grad()
    def _image_tokens(self, rows: dict, ready: dict) -> Tensor:
        if self.images is None:
            states = _chunks(ready["image_tokens"])
        else:
            states = (self.image_encoder.encode(self.images(part)).tokens for part in _chunks(rows["index"]))
        return torch.cat([self.image_encoder.project(part).float() for part in states])


def _chunks(rows) -> Iterator:
    """Encoders see so many rows at a time, whatever the batch."""
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


class DatasetImages:
    """The encoded images of a dataset in memory, decoded when they are asked for.

    Files stay on the disk; images inside archives and tables are held as they are (about 4 KB each for small icons,
    100 KB for photographs): for data larger than memory, cache image tokens in the store instead.

    Args:
        path: Dataset in any form that `csdiff embed` reads.
        store: The store that was made from it.
        allow_outside: Read images that it names outside its folder.
    """

    def __init__(self, path: str, store: EmbeddingStore, allow_outside: bool = False):
        self.path, self.store = path, store
        source = open_source(path, allow_outside=allow_outside)
        if not source.has_images:
            raise CSDiffError(f"{path} has no images, and an image encoder is to see them at every step.")
        self._images: dict[str, bytes | Path] = {
            item.id: item.image
            for unit in range(source.units(10_000))
            for item in source.read(unit, 10_000)
            if isinstance(item, Item) and item.image is not None
        }

    def __call__(self, rows: Tensor) -> list[Image]:
        """Images of rows of the store.

        Raises:
            CSDiffError: an image of the store is not in the dataset, or cannot be decoded any more.
        """
        try:
            return [decode_image(self._images[name]) for name in self.store.image_ids(rows)]
        except (KeyError, UnreadableImage) as error:
            raise CSDiffError(
                f"{self.path}: an image of the store cannot be read here ({error}): give the dataset that the store "
                "was made from, unchanged."
            ) from error
