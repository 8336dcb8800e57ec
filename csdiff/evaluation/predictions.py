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
def predict(card: AdapterCard, pairs: HeldOutPairs, device: str | torch.device = "cpu", seed: int = 0) -> Tensor:
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
    encoder, size = None, 512
    if adapter.uses_input_ids:
        from csdiff.embeddings import load_caption_tokenizer

        tokenize = load_caption_tokenizer(known.get("id") or adapter.config.get("text_encoder"))
    elif adapter.uses_text_states and "text_states" not in pairs.store.keys:
        from csdiff.embeddings import load_text_encoder

        encoder, size = load_text_encoder(known["id"], device, **text_encoder_options(known, card)), 64
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rows, text in zip(torch.from_numpy(pairs.rows).split(size), pairs.text.split(size), strict=True):
        tokens = ()
        if adapter.uses_input_ids:
            ids, mask = tokenize(pairs.store.captions(rows))
            parts.append(adapter.embed_input_ids(ids.to(device), mask.to(device)).float().cpu())
            continue
        if encoder is not None:
            encoding = encoder.encode(pairs.store.captions(rows))
            tokens = encoding.states.float(), encoding.mask
        elif adapter.uses_text_states:
            stored = pairs.store.read(rows, ["text_states", "text_mask"])
            tokens = stored["text_states"].to(device), stored["text_mask"].to(device)
        parts.append(adapter.embed(text.to(device), *tokens, generator=generator).float().cpu())
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
