"""Captions to text embeddings with any transformers text encoder: CLIP, SigLIP, sentence encoders, language models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csdiff.embeddings.encoders import Encoder, EncoderFiles, encoder_files, load_config, load_weights
from csdiff.embeddings.tokenizer import CaptionTokenizer, read_tokenizer
from csdiff.errors import CSDiffError

POOLINGS = ("projection", "mean", "last", "cls")
# Types of models with a text tower, whole or that tower alone, and its class.
TEXT_TOWERS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}


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
    tokenizer, padding = read_tokenizer(files, name), "longest"
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
