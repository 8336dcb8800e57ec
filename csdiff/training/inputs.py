"""From rows of a store to what the embedder takes: on its device, with the frozen encoders that are in the loop."""

from collections.abc import Iterator

import torch
from torch import Tensor

from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.loader import StoreBatches
from csdiff.embeddings.text_encoder import TextEncoder
from csdiff.embeddings.tokenizer import CaptionTokenizer
from csdiff.training.data import Pairs
from csdiff.training.gradient_cache import Rows
from csdiff.training.pictures import Pictures

_CHUNK = 256


class Inputs:
    """Prepares batches.

    Args:
        device: Of the embedder.
        text_keys: Columns read of the text side.
        image_keys: Columns read of the image side.
        text_encoder: Frozen text encoder in the loop, or None.
        tokenize: For an adapter inside the text encoder, or None.
        image_encoder: Frozen image encoder whose projection maps image tokens, or None without a token-level term.
        pictures: Pictures by identity for that encoder in the loop, or None where its tokens are cached.
    """

    def __init__(
        self,
        device: str | torch.device,
        text_keys: tuple[str, ...] = ("text_embeds",),
        image_keys: tuple[str, ...] = ("image_embeds",),
        text_encoder: TextEncoder | None = None,
        tokenize: CaptionTokenizer | None = None,
        image_encoder: ImageEncoder | None = None,
        pictures: Pictures | None = None,
    ):
        self.device = torch.device(device)
        self.keys = {
            "pairs": (*text_keys, *image_keys),
            "unpaired_text": text_keys,
            "unpaired_image": ("image_embeds",),
        }
        self.text_encoder, self.tokenize = text_encoder, tokenize
        self.image_encoder, self.pictures = image_encoder, pictures

    @property
    def captions(self) -> bool:
        """Whether captions are read."""
        return self.text_encoder is not None or self.tokenize is not None

    def prepare(self, batch: Rows) -> Rows:
        """Move every group to the device and encode what is not cached."""
        return {group: self._rows(rows, tokens=group == "pairs") for group, rows in batch.items()}

    def _rows(self, rows: dict, tokens: bool) -> dict:
        ready: dict[str, Tensor] = {
            name: value.to(self.device, non_blocking=True)
            for name, value in rows.items()
            if isinstance(value, Tensor) and name != "index"
        }
        if "captions" in rows and self.tokenize is not None:
            ready["input_ids"], ready["text_mask"] = (t.to(self.device) for t in self.tokenize(rows["captions"]))
        if "captions" in rows and self.text_encoder is not None:
            ready |= self._encode_text(rows["captions"])
        if tokens and self.image_encoder is not None:
            ready["image_tokens"] = self._image_tokens(rows, ready)
        return ready

    @torch.no_grad()
    def _image_tokens(self, rows: dict, ready: dict) -> Tensor:
        if self.pictures is None:
            states = ready["image_tokens"].split(_CHUNK)
        else:
            names = rows["image_ids"]
            chunks = (self.pictures(names[start : start + _CHUNK]) for start in range(0, len(names), _CHUNK))
            states = (self.image_encoder.encode(pictures).tokens for pictures in chunks)
        return torch.cat([self.image_encoder.project(part).float() for part in states])

    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        parts = [self.text_encoder.encode(captions[i : i + _CHUNK]) for i in range(0, len(captions), _CHUNK)]
        return {
            "text_embeds": torch.cat([p.embeds for p in parts]).float(),
            "text_states": torch.cat([p.states for p in parts]).float(),
            "text_mask": torch.cat([p.mask for p in parts]),
        }

    def batches(
        self, group: str, pairs: Pairs, batch_size: int, seed: int, rank: int, world_size: int, step: int
    ) -> Iterator[dict]:
        """Endless batches of one group, this process's part of them, from a step on."""
        loader = StoreBatches(
            pairs.store,
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start_step=step,
            keys=self.keys[group],
            captions=self.captions and group != "unpaired_image",
            rows=pairs.rows,
            groups=pairs.groups,
        )
        for batch in loader:
            if group == "pairs" and self.pictures is not None:
                batch["image_ids"] = pairs.store.image_ids(batch["index"])
            yield batch

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
