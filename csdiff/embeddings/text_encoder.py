"""Captions to text embeddings with any transformers text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from csdiff.embeddings.encoders import EncoderFiles, load_config, load_weights
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.embeddings.tokenizer import CaptionTokenizer, read_tokenizer
from csdiff.errors import CSDiffError

POOLINGS = ("projection", "mean", "last", "cls")


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


class TextEncoder:
    """A frozen text encoder with its tokenizer; made by `load_text_encoder`.

    Attributes:
        dim: D, width of the pooled embeddings.
        states_dim: H, width of the token states.
        pooling: How token states become one embedding: "projection", "mean", "last" or "cls".
    """

    def __init__(self, model, tokenizer: CaptionTokenizer, id: str, files: EncoderFiles, pooling: str):
        self.model, self.caption_tokenizer, self.id, self.files = model, tokenizer, id, files
        self.pooling = pooling
        self.states_dim: int = model.config.hidden_size
        self.dim: int = model.config.projection_dim if pooling == "projection" else self.states_dim

    @classmethod
    def load(cls, id, files, *, device=None, dtype=None, pooling=None, max_length=None) -> TextEncoder:
        model_class, tokenizer, pooling = cls.inspect(id, files, pooling, max_length)
        model = load_weights(model_class, files, id, device, dtype)
        if not hasattr(model.config, "hidden_size"):
            kind = model.config.model_type
            raise CSDiffError(f"{id}: expected a text encoder, found a {kind} model; choose another.")
        return cls(model, tokenizer, id, files, pooling)

    @staticmethod
    def inspect(id: str, files: EncoderFiles, pooling: str | None, max_length: int | None) -> tuple:
        """Everything about an encoder but its weights: model class, tokenizer and pooling.

        Raises:
            CSDiffError: No tokenizer, or a pooling or length that the encoder does not have.
        """
        from transformers import AutoModel, CLIPTextModelWithProjection, T5EncoderModel

        config = load_config(id, files)
        is_clip = config.model_type in ("clip", "clip_text_model")
        pooling = pooling or ("projection" if is_clip else _usual_pooling(files, config))
        if pooling not in POOLINGS or (pooling == "projection") != is_clip:
            known = "projection" if is_clip else ", ".join(POOLINGS[1:])
            raise CSDiffError(f"{id}: expected pooling {known} for a {config.model_type} encoder, found {pooling!r}.")
        encoder_only = {"t5": T5EncoderModel, "umt5": T5EncoderModel, "mt5": T5EncoderModel}
        model_class = CLIPTextModelWithProjection if is_clip else encoder_only.get(config.model_type, AutoModel)
        return model_class, CaptionTokenizer(read_tokenizer(id, files), max_length), pooling

    @property
    def tokenizer(self):
        """The transformers tokenizer."""
        return self.caption_tokenizer.tokenizer

    @property
    def max_length(self) -> int:
        """L, tokens a caption is cut or padded to."""
        return self.caption_tokenizer.max_length

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tokenize(self, captions: Sequence[str], padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """Token ids and mask, each (B, L), cut to `max_length` and padded to it (or with "longest" to the batch)."""
        ids, mask = self.caption_tokenizer(captions, padding)
        return ids.to(self.device), mask.to(self.device)

    def forward(self, input_ids: Tensor, mask: Tensor) -> TextEncoding:
        """Encode tokens; differentiable when the model's weights are."""
        if self.pooling == "projection":
            # Without a mask, as the diffusers priors call it: the causal tower never looks at the padding behind.
            output = self.model(input_ids)
            return TextEncoding(output.text_embeds, output.last_hidden_state, mask)
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
        return self.forward(*self.tokenize(captions))

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Pooled embeddings (B, D) alone, padded only as far as the longest caption of the batch."""
        return self.forward(*self.tokenize(captions, padding="longest")).embeds

    def project(self, states: Tensor) -> Tensor:
        """Token states (B, L, H) in the space of the embeddings (B, L, D): CLIP's projection, else as they are."""
        return self.model.text_projection(states) if self.pooling == "projection" else states

    def describe(self, weights: bool = True) -> dict:
        """This encoder's part of a `csdiff.json`; without `weights` what needs no reading of the files."""
        identity = {}
        if weights:
            identity = {"id": self.id, "revision": self.files.revision, "weights_sha256": self._weights_sha256}
        return {
            **identity,
            "dim": self.dim,
            "class": type(self.model).__name__,
            "pooling": self.pooling,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def describe_tokenizer(self) -> dict:
        """The tokenizer's part of a `csdiff.json`."""
        return self.caption_tokenizer.describe()

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.files.model, "text" if self.pooling == "projection" else None)


def _usual_pooling(files: EncoderFiles, config) -> str:
    sentence_encoder = files.model / "1_Pooling" / "config.json"
    if sentence_encoder.exists():
        modes = json.loads(sentence_encoder.read_text(encoding="utf-8"))
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
        return next((name for key, name in names.items() if modes.get(key)), "mean")
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    return "last" if causal else "mean"
