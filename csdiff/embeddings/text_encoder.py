"""Captions to token ids and to text embeddings, with any transformers text encoder: CLIP, SigLIP, language models."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csdiff.data.items import well_formed
from csdiff.embeddings.encoders import Encoder, EncoderFiles, encoder_files, load_config, load_weights, quiet_loading
from csdiff.errors import CSDiffError

POOLINGS = ("projection", "mean", "last", "cls")
# Types of models with a text tower, whole or that tower alone, and its class.
TEXT_TOWERS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
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


@dataclass(frozen=True)
class TextEncoding:
    """What a text encoder makes of B captions.

    Attributes:
        embeds: `(B, D)` pooled embeddings, raw: never normalised.
        states: `(B, L, H)` last hidden states.
        mask: `(B, L)` bool, True at the tokens of the caption.
    """

    embeds: Tensor
    states: Tensor
    mask: Tensor


class TextEncoder(Encoder):
    """A frozen text encoder with its tokenizer; made by `load_text_encoder`.

    Attributes:
        dim: D, width of the pooled embeddings.
        states_dim: H, width of the token states.
        pooling: How token states become one embedding: "projection", "mean", "last" or "cls".
    """

    tower = "text"

    def __init__(self, model, tokenizer: CaptionTokenizer, files: EncoderFiles, pooling: str):
        super().__init__(model, files)
        self.caption_tokenizer, self.pooling = tokenizer, pooling
        # SigLIP's head maps the last token, padding or not; CLIP's projection the end of the text.
        self.projection = getattr(model, "text_projection", None) or getattr(model, "head", None)
        self.states_dim: int = model.config.hidden_size
        self.dim: int = self.projection.out_features if pooling == "projection" else self.states_dim

    @property
    def tokenizer(self):
        """The transformers tokenizer."""
        return self.caption_tokenizer.tokenizer

    @property
    def max_length(self) -> int:
        """L, tokens a caption is cut or padded to."""
        return self.caption_tokenizer.max_length

    def forward(self, input_ids: Tensor, mask: Tensor) -> TextEncoding:
        """Encode tokens, as `caption_tokenizer` gives them; differentiable when the model's weights are."""
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        if self.pooling == "projection":
            # Without a mask: CLIP's causal tower never looks at the padding behind, SigLIP was trained with it.
            output = self.model(input_ids)
            embeds = output.text_embeds if "text_embeds" in output else output.pooler_output
            return TextEncoding(embeds, output.last_hidden_state, mask)
        states = self.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(states.dtype)
            embeds = (states * weights).sum(1) / weights.sum(1)
        elif self.pooling == "last":
            embeds = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        else:
            embeds = states[:, 0]
        return TextEncoding(embeds, states, mask)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextEncoding:
        """Encode captions, padded to `max_length`; longer ones are cut."""
        return self.forward(*self.caption_tokenizer(captions, "max_length"))

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Pooled embeddings (B, D) alone, padded no further than the encoder needs."""
        return self.forward(*self.caption_tokenizer(captions)).embeds

    def project(self, states: Tensor) -> Tensor:
        """Token states (B, L, H) in the space of the embeddings (B, L, D): by the projection, else as they are."""
        return self.projection(states) if self.pooling == "projection" else states


def load_text_encoder(
    id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
) -> TextEncoder:
    """Load any transformers text encoder: a text tower with its projection, a sentence encoder, a language model.

    Args:
        id: "tiny-clip", a folder (of a model, or of a diffusers pipeline that has a text encoder), or a hub id.
        device: Where to put it; the CPU by default.
        dtype: Of the weights; by default the checkpoint's own, float32 on the CPU.
        revision: Branch, tag or commit on the hub.
        pooling: "projection" (CLIP, SigLIP), "mean", "last" or "cls". By default the projection where there is one,
            what `1_Pooling/config.json` says for sentence encoders, the last token for causal language models, else
            the mean.
        max_length: Tokens a caption may have; by default the tokenizer's limit, at most 512.

    Raises:
        CSDiffError: Nothing there, not a text encoder, weights missing, or pickled weights.
    """
    files = encoder_files(id, "text", revision)
    model_class, tokenizer, pooling = inspect_text_encoder(files, pooling, max_length)
    model = load_weights(model_class, files, device, dtype)
    if not hasattr(model.config, "hidden_size"):
        raise CSDiffError(f"{id}: expected a text encoder, found a {model.config.model_type} model.")
    return TextEncoder(model, tokenizer, files, pooling)


def load_caption_tokenizer(
    id: str | Path, *, revision: str | None = None, max_length: int | None = None
) -> CaptionTokenizer:
    """The tokenizer of a text encoder without the encoder's weights; arguments and errors of `load_text_encoder`."""
    return inspect_text_encoder(encoder_files(id, "text", revision), None, max_length)[1]


def inspect_text_encoder(
    files: EncoderFiles, pooling: str | None, max_length: int | None
) -> tuple[type, CaptionTokenizer, str]:
    """Everything about a text encoder but its weights: model class, tokenizer and pooling."""
    import transformers

    config = load_config(files)
    tower = TEXT_TOWERS.get(config.model_type.removesuffix("_text_model"))
    pooling = pooling or ("projection" if tower else _usual_pooling(files, config))
    if pooling not in POOLINGS or (pooling == "projection") != (tower is not None):
        known = "projection" if tower else ", ".join(POOLINGS[1:])
        raise CSDiffError(
            f"{files.id}: expected pooling {known} for a {config.model_type} encoder, found {pooling!r}."
        )
    encoder_only = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "mt5": "MT5EncoderModel"}
    model_class = getattr(transformers, tower or encoder_only.get(config.model_type, "AutoModel"))
    # A SigLIP 2 tower alone has lost the tokenizer that transformers takes for the whole: it writes in lower case.
    name = "Siglip2Tokenizer" if tower == "Siglip2TextModel" else "AutoTokenizer"
    tokenizer, padding = _read_tokenizer(files, name), "longest"
    if tower and tower.startswith("Siglip"):
        padding = "max_length"
        positions = getattr(config, "text_config", config).max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return model_class, CaptionTokenizer(tokenizer, max_length, padding), pooling


def _usual_pooling(files: EncoderFiles, config) -> str:
    sentence_encoder = files.model / "1_Pooling" / "config.json"
    if sentence_encoder.exists():
        modes = json.loads(sentence_encoder.read_text(encoding="utf-8"))
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
        return next((name for key, name in names.items() if modes.get(key)), "mean")
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    return "last" if causal else "mean"


def _read_tokenizer(files: EncoderFiles, name: str):
    """The transformers tokenizer of a folder, by the name of its class."""
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
