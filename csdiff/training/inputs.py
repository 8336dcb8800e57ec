"""From rows of a store to what the embedder takes: on its device, with the frozen encoders that are in the loop."""

from collections.abc import Iterator

import torch
from torch import Tensor

from csdiff.embeddings.loader import StoreBatches
from csdiff.embeddings.text_encoder import caption_length
from csdiff.training.data import Pairs
from csdiff.training.gradient_cache import Rows

_CHUNK = 256


class Tokenize:
    """Captions to `input_ids` (B, L), cut to the tokenizer's limit and padded to the longest of the batch."""

    def __init__(self, tokenizer):
        self.tokenizer, self.length = tokenizer, caption_length(tokenizer)

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(
            captions, padding="longest", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids


class Inputs:
    """Prepares batches.

    Args:
        device: Of the embedder.
        text_keys: Columns read of the text side.
        image_keys: Columns read of the image side.
        text_encoder: Frozen text encoder in the loop, or None.
        image_encoder: Frozen image encoder in the loop, or None.
        tokenize: Captions to `input_ids`, for an adapter inside the text encoder, or None.
    """

    def __init__(
        self,
        device,
        text_keys: tuple[str, ...],
        image_keys: tuple[str, ...],
        text_encoder=None,
        image_encoder=None,
        tokenize=None,
    ):
        self.device = torch.device(device)
        self.keys = {
            "pairs": (*text_keys, *image_keys),
            "unpaired_text": text_keys,
            "unpaired_image": ("image_embeds",),
        }
        self.text_encoder, self.image_encoder, self.tokenize = text_encoder, image_encoder, tokenize

    @property
    def captions(self) -> bool:
        """Whether captions are read."""
        return self.text_encoder is not None or self.tokenize is not None

    def prepare(self, batch: Rows) -> Rows:
        """Move every group to the device and encode what is not cached."""
        return {group: self._rows(rows) for group, rows in batch.items()}

    def _rows(self, rows: dict) -> dict:
        ready: dict[str, Tensor] = {
            name: value.to(self.device, non_blocking=True)
            for name, value in rows.items()
            if isinstance(value, Tensor) and name != "index"
        }
        captions = rows.get("captions")
        if captions is not None and self.tokenize is not None:
            ready["input_ids"] = self.tokenize(captions).to(self.device)
        if captions is not None and self.text_encoder is not None:
            ready |= self._encode_text(captions)
        return ready

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
        return iter(
            StoreBatches(
                pairs.store,
                batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
                start_step=step,
                keys=self.keys[group],
                captions=self.captions and group != "unpaired_image",
                rows=pairs.rows,
            )
        )

    def read(self, pairs: Pairs, block: int = 1024) -> list[dict]:
        """All rows of a set of pairs, prepared, in blocks."""
        blocks = []
        for start in range(0, len(pairs), block):
            rows = pairs.rows[start : start + block]
            raw: dict = dict(pairs.store.read(rows, self.keys["pairs"]))
            if self.captions:
                raw["captions"] = pairs.store.captions(rows)
            blocks.append(self._rows(raw))
        return blocks
