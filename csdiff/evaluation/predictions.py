"""What an adapter makes of the captions of a store."""

from __future__ import annotations

import torch
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.evaluation.data import HeldOutPairs
from csdiff.pipelines.pairing import AdapterCard


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

    adapter = AutoAdapter.from_pretrained(card.path).to(device).eval()
    encoder_id = (card.metadata.get("text_encoder") or {}).get("id")
    tokenize = encoder = None
    states = bool(adapter.uses_text_states) and not adapter.uses_input_ids
    if adapter.uses_input_ids:
        from csdiff.training.inputs import Tokenize

        tokenize = Tokenize(_known(encoder_id or adapter.config.get("text_encoder"), card))
    elif states and "text_states" not in pairs.store.keys:
        from csdiff.embeddings import load_text_encoder

        limit = (card.metadata.get("tokenizer") or {}).get("max_length")
        encoder = load_text_encoder(_known(encoder_id, card), device, max_length=limit)
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


def _known(encoder_id: str | None, card: AdapterCard) -> str:
    if not encoder_id:
        raise CSDiffError(
            f"{card.path} reads captions and does not say which text encoder it belongs to; train it from a store "
            "with a fingerprint."
        )
    return encoder_id
