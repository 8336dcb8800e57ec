"""Prompts to the image embeddings a decoder takes."""

import logging

import torch

from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import DecoderSource
from csdiff.pipelines.pairing import AdapterCard, text_encoder_options

logger = logging.getLogger(__name__)


def known_text_encoder(card: AdapterCard | None, decoder: DecoderSource) -> dict:
    """The text encoder that the adapter names, else the decoder's.

    Raises:
        CSDiffError: neither names one.
    """
    known = decoder.encoder("text") if card is None else card.metadata.get("text_encoder") or decoder.encoder("text")
    if not (known or {}).get("id"):
        raise CSDiffError(
            f"No text encoder is known: neither the adapter's csdiff.json nor the decoder {decoder.source} names "
            "one; use an adapter trained from a store with a fingerprint."
        )
    return known


class PromptEmbedder:
    """Text encoder and adapter, loaded: prompts to raw image embeddings.

    Args:
        card: the adapter; None hands on the raw text embedding.
        decoder: the decoder the embeddings are for.
        device: where the models run.
        dtype: of the text encoder; the adapter computes in float32.

    Attributes:
        text_encoder: id, revision and hash of the text encoder.

    Raises:
        CSDiffError: no text encoder is known, it is not the one the adapter was trained on, or (without an adapter)
            its embeddings are not as wide as the decoder's.
    """

    def __init__(self, card: AdapterCard | None, decoder: DecoderSource, device: torch.device, dtype: torch.dtype):
        self.decoder, self.device, self.dtype = decoder, device, dtype
        self.adapter = None
        self.image_encoder = decoder.encoder("image") or (card.metadata.get("image_encoder") if card else None)
        known = known_text_encoder(card, decoder)
        self.text_encoder = {key: known.get(key) for key in ("id", "revision", "weights_sha256")}
        self.encoder = load_text_encoder(known["id"], device, dtype, **text_encoder_options(known, card))
        if card is None:
            if self.encoder.dim != decoder.embedding_dim:
                raise CSDiffError(
                    f"--adapter none: the text embeddings of {known['id']} have {self.encoder.dim} dimensions, but "
                    f"the decoder takes {decoder.embedding_dim}; an adapter is needed between them."
                )
            return
        # a commit of a hub repository cannot change; a folder can
        if known.get("weights_sha256") and not known.get("revision"):
            check_same_encoder(known, self.encoder.describe(), "text", "the adapter", f"the folder {known['id']} now")
        from csdiff.adapters import AutoAdapter

        # LoRA wraps layers of the encoder in place: what it encodes is then adapted
        options = {"base_model": self.encoder.model} if card.kind == "LoRAAdapter" else {}
        self.adapter = AutoAdapter.from_pretrained(card.path, **options).to(device).eval()

    @property
    def samples(self) -> bool:
        """Whether one prompt has many embeddings: adapters with a noise token, and diffusion."""
        return self.adapter is not None and (
            not self.adapter.one_shot or bool(self.adapter.config.get("noise_token", False))
        )

    @torch.no_grad()
    def embed(self, prompts: list[str], generators: list[torch.Generator] | None = None) -> torch.Tensor:
        """Prompts to raw image embeddings `(len(prompts), D)`; warns of prompts that are cut.

        Each prompt is embedded by itself, so that its embedding does not depend on what else is drawn.

        Args:
            prompts: B texts.
            generators: B generators for adapters that sample.

        Raises:
            CSDiffError: an embedding is not finite.
        """
        self._warn_of_cut(prompts)
        rows = []
        for row, prompt in enumerate(prompts):
            text = self.encoder.encode([prompt])
            if self.adapter is None:
                rows.append(text.embeds)
                continue
            options = {"generator": generators[row]} if generators and self.samples else {}
            rows.append(self.adapter.embed(text.embeds.float(), text.states.float(), text.mask, **options))
        embeds = torch.cat(rows)
        finite = embeds.isfinite().all(dim=1).tolist()
        if not all(finite):
            raise CSDiffError(
                f"The image embedding of {prompts[finite.index(False)]!r} is not finite: expected numbers, found NaN "
                "or infinity; "
                + (
                    f"copy the text encoder {self.text_encoder['id']} again."
                    if self.adapter is None
                    else "the adapter was trained on too little data or has diverged, train it again."
                )
            )
        return embeds.to(self.dtype)

    @torch.no_grad()
    def negative(self, prompt: str | None) -> torch.Tensor | None:
        """The decoder's negative `(1, D)`: the embedded negative prompt, or what the decoder was trained with.

        Kandinsky 2.2 was trained with the embedding of an all-zero image; the others take zeros, their own default.
        """
        if prompt is not None:
            return self.embed([prompt])
        if self.decoder.hand_over != "kandinsky":
            return None
        known = self.image_encoder
        if not (known or {}).get("id"):
            raise CSDiffError(
                f"Neither the decoder {self.decoder.source} nor the adapter names an image encoder, which guidance "
                "needs for its default negative; give --negative_prompt, or --guidance 1."
            )
        encoder = load_image_encoder(known["id"], self.device, self.dtype, revision=known.get("revision"))
        size = encoder.model.config.image_size
        embeds = encoder.forward(torch.zeros(1, 3, size, size)).embeds
        if not embeds.isfinite().all():
            raise CSDiffError(
                f"The image encoder {known['id']} embeds an all-zero picture, the default negative, as NaN or "
                "infinity: copy it again, or give --negative_prompt."
            )
        return embeds.to(self.dtype)

    def _warn_of_cut(self, prompts: list[str]):
        tokenizer, limit = self.encoder.tokenizer, self.encoder.max_length
        for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > limit:
                lost = tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
                logger.warning(
                    "The prompt %r has %d tokens, the text encoder reads %d; this end is cut off: %r",
                    prompt[:60],
                    len(ids),
                    limit,
                    lost,
                )
