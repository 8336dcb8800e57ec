"""Captions to token ids: the one way, in which a caption is text and never a command."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from csdiff.data.items import well_formed
from csdiff.embeddings.encoders import EncoderFiles, encoder_files, quiet_loading
from csdiff.errors import CSDiffError

# Language models state no limit, or one of a hundred thousand tokens; captions need neither.
LONGEST_CAPTION = 512
VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model")


class CaptionTokenizer:
    """A transformers tokenizer for captions and prompts.

    `<|endoftext|>` in a caption is eleven letters and some signs, not the end of the text: neither is the rest lost,
    nor does an id of a special token come of it. Half a surrogate pair, left by a cut emoji, becomes U+FFFD.

    Args:
        tokenizer: Of transformers; it splits the texts of special tokens from now on, whoever calls it.
        max_length: Tokens a caption may have; by default the tokenizer's limit, at most 512.
        padding: "longest" pads behind, to the longest caption of a batch; "max_length" always to `max_length`, on the
            tokenizer's own side, which some encoders (SigLIP) were trained with.

    Attributes:
        tokenizer: The transformers tokenizer.
        max_length: L, tokens a caption is cut to.

    Raises:
        CSDiffError: `max_length` beyond the tokenizer's limit.
    """

    def __init__(self, tokenizer, max_length: int | None = None, padding: str = "longest"):
        limit = tokenizer.model_max_length
        if max_length is not None and max_length > limit:
            raise CSDiffError(f"max_length: expected at most {limit}, the tokenizer's limit, found {max_length}.")
        self.tokenizer, self.padding = tokenizer, padding
        self.max_length = max_length or min(limit, LONGEST_CAPTION)
        tokenizer.split_special_tokens = True
        if padding == "longest":
            tokenizer.padding_side = "right"
        texts = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)", re.IGNORECASE)
        self._special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
        # How many special tokens the tokenizer itself puts around a caption.
        self._own = len(tokenizer("").input_ids)

    def __call__(self, captions: Sequence[str], padding: str | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) and mask (B, L) bool, cut to `max_length` and padded behind."""
        texts = [well_formed(caption) for caption in captions]
        tokens = self._tokenize(texts, padding)
        # Tokenizers that look whole words up (Unigram) find special tokens in split text too: break their texts.
        counts = (torch.isin(tokens.input_ids, self._special_ids) & tokens.attention_mask.bool()).sum(1)
        leaks = (counts > self._own).tolist()
        if any(leaks):
            texts = [self._broken(text) if leak else text for text, leak in zip(texts, leaks, strict=True)]
            tokens = self._tokenize(texts, padding)
        return tokens.input_ids, tokens.attention_mask.bool()

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it is cut."""
        texts = [well_formed(caption) for caption in captions]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]

    def describe(self) -> dict:
        """The tokenizer's part of a `csdiff.json`."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        return {"class": type(self.tokenizer).__name__, "vocab_sha256": digest, "max_length": self.max_length}

    def _tokenize(self, texts: list[str], padding: str | None):
        options = {"padding": padding or self.padding, "max_length": self.max_length, "truncation": True}
        return self.tokenizer(texts, **options, return_tensors="pt", return_attention_mask=True)

    def _broken(self, text: str) -> str:
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", unicodedata.normalize("NFKC", text))


def load_caption_tokenizer(
    id: str | Path, *, revision: str | None = None, max_length: int | None = None
) -> CaptionTokenizer:
    """The tokenizer of a text encoder, without the encoder's weights.

    Args:
        id: As for `load_text_encoder`.
        revision: Branch, tag or commit on the hub.
        max_length: Tokens a caption may have; by default the tokenizer's limit, at most 512.

    Raises:
        CSDiffError: No such encoder, or no tokenizer there.
    """
    return CaptionTokenizer(read_tokenizer(encoder_files(id, "text", revision)), max_length)


def read_tokenizer(files: EncoderFiles, name: str = "AutoTokenizer"):
    """The transformers tokenizer of a folder, by the name of its class where the folder does not tell."""
    import transformers

    where = f"{files.id}: expected a tokenizer in {files.processor}"
    # Without its files transformers makes an empty tokenizer of the model's type.
    if not any(file for pattern in VOCABULARY_FILES for file in files.processor.glob(pattern)):
        raise CSDiffError(f"{where}, found no vocabulary; save it there.")
    with quiet_loading():
        try:
            tokenizer = getattr(transformers, name).from_pretrained(files.processor, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CSDiffError(f"{where}, found none that loads ({error}).") from error
    if tokenizer.pad_token is None:
        # Language models have none; the mask hides whatever stands there.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
