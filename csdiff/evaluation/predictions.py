"""What an adapter makes of the captions of a store."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from csdiff.embeddings.encoders import encoder_files, find_encoder
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.data import HeldOutPairs
from csdiff.pipelines.decoders import AdapterCard
from csdiff.pipelines.embedding import text_encoder_options


@torch.no_grad()
def predict(
    card: AdapterCard, pairs: HeldOutPairs, device: str | torch.device = "cpu", batch_size: int = 512, seed: int = 0
) -> Tensor:
    """Predicted raw image embeddings `(N, D)` of the rows of `pairs`, on the CPU.

    Token states that the adapter reads and the store does not have are encoded from the captions, as are the captions
    for an adapter inside the text encoder. Adapters that sample draw their noise from `seed`.

    Raises:
        CSDiffError: captions or an encoder are needed and not known, or predictions are not finite.
    """
    from csdiff.adapters import AutoAdapter

    known = card.metadata.get("text_encoder") or {}
    moved = {"text_encoder": known["id"]} if card.kind == "LoRAAdapter" and Path(known.get("id", "")).is_dir() else {}
    adapter = AutoAdapter.from_pretrained(card.path, **moved).to(device).eval()
    tokenize = encoder = None
    states = bool(adapter.uses_text_states) and not adapter.uses_input_ids
    if adapter.uses_input_ids:
        from csdiff.embeddings import load_caption_tokenizer

        tokenize = load_caption_tokenizer(known.get("id") or adapter.config.get("text_encoder"))
    elif states and "text_states" not in pairs.store.keys:
        from csdiff.embeddings import load_text_encoder

        encoder = load_text_encoder(known["id"], device, **text_encoder_options(known, card))
        batch_size = min(batch_size, 64)
    samples = not adapter.one_shot or bool(adapter.config.get("noise_token", False))
    options = {"generator": torch.Generator().manual_seed(seed)} if samples else {}
    parts = []
    for start in range(0, len(pairs.rows), batch_size):
        rows = pairs.rows[start : start + batch_size]
        text = pairs.text[start : start + batch_size].to(device)
        if tokenize is not None:
            ids, mask = tokenize(pairs.store.captions(rows))
            part = adapter.embed_input_ids(ids.to(device), mask.to(device))
        elif encoder is not None:
            encoding = encoder.encode(pairs.store.captions(rows))
            part = adapter.embed(text, encoding.states.float(), encoding.mask, **options)
        elif states:
            tokens = pairs.store.read(rows, ["text_states", "text_mask"])
            part = adapter.embed(text, tokens["text_states"].to(device), tokens["text_mask"].to(device), **options)
        else:
            part = adapter.embed(text, **options)
        parts.append(part.float().cpu())
    prediction = torch.cat(parts)
    if not prediction.isfinite().all():
        raise CSDiffError(
            f"{card.path}: expected finite predictions, found NaN or infinity; the adapter has diverged, train it "
            "again."
        )
    return prediction


def check_encoder_is_known(card: AdapterCard, store: EmbeddingStore) -> None:
    """Refuses an adapter whose captions :func:`predict` could not encode; reads no weights of encoders.

    Raises:
        CSDiffError: the adapter does not name its text encoder, or that is not there.
    """
    from csdiff.adapters import AutoAdapter

    known = card.metadata.get("text_encoder") or {}
    if card.kind == "LoRAAdapter":
        known = {"id": card.config.get("text_encoder"), **known}
    elif "text_states" in store.keys or not AutoAdapter.from_pretrained(card.path).uses_text_states:
        return
    found = find_encoder(known, "text", of=f"the adapter {card.path}")
    encoder_files(found["id"], "text", found.get("revision"))
