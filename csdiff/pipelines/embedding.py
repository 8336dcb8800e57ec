"""Prompts to the image embeddings a decoder takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from csdiff.adapters import AutoAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.embeddings.encoders import find_encoder
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, DecoderSource

logger = logging.getLogger(__name__)


class PromptEmbedder:
    """Text encoder and adapter, loaded: prompts to raw image embeddings.

    Args:
        card: The adapter; None hands on the raw text embedding.
        decoder: The decoder the embeddings are for.
        options: Of these the number format of the encoders (the adapter computes in float32), and where they are, if
            not where the adapter says.
        device: Where the models run.

    Attributes:
        text_encoder: Id, revision and hash of the text encoder.
        image_encoder: What is known of the image encoder, if anything.

    Raises:
        CSDiffError: no text encoder is known, it is not the one the adapter was trained on, or (without an adapter)
            its embeddings are not as wide as the decoder's.
    """

    def __init__(
        self, card: AdapterCard | None, decoder: DecoderSource, options: GenerateConfig, device: torch.device
    ):
        self.decoder, self.device, self.adapter = decoder, device, None
        self.dtype = decoder.dtype(options.dtype, device)
        metadata = card.metadata if card else {}
        self.image_encoder = decoder.image_encoder or metadata.get("image_encoder")
        if options.image_encoder is not None:
            self.image_encoder = find_encoder(self.image_encoder, "image", options.image_encoder, "the adapter")
        known = known_text_encoder(card, decoder, options.text_encoder)
        self.text_encoder = {key: known.get(key) for key in ("id", "revision", "weights_sha256")}
        self.encoder = load_text_encoder(known["id"], device, self.dtype, **text_encoder_options(known, metadata))
        if card is None:
            if self.encoder.dim != decoder.embedding_dim:
                raise CSDiffError(
                    f"--adapter none: the text embeddings of {known['id']} have {self.encoder.dim} dimensions, but "
                    f"the decoder takes {decoder.embedding_dim}; an adapter is needed between them."
                )
            return
        # A commit of a hub repository cannot change; a folder can.
        if options.text_encoder is None and known.get("weights_sha256") and not known.get("revision"):
            check_same_encoder(known, self.encoder.describe(), "text", "the adapter", f"the folder {known['id']} now")
        # LoRA wraps layers of the encoder in place: what it encodes is then adapted.
        base = {"base_model": self.encoder.model} if card.kind == "LoRAAdapter" else {}
        self.adapter = AutoAdapter.from_pretrained(card.path, **base).to(device).eval()

    def prepare(
        self, images: Sequence[tuple[str, int]], options: GenerateConfig
    ) -> tuple[list[str], Tensor, Tensor | None, list[torch.Generator]]:
        """What `Decoder.draw` draws N images from, each given by its prompt and its seed.

        Returns:
            Prompts, image embeddings `(N, D)`, the negative, and generators of the noise.

        Raises:
            CSDiffError: as `embed` and `negative`.
        """
        prompts = [prompt for prompt, _ in images]
        generators = own = [noise(seed) for _, seed in images]
        if options.spread and not self.samples:
            # The noise of the decoder stays what it is without spread.
            own = [noise(2**63 - 1 - seed) for _, seed in images]
        return prompts, self.embed(prompts, own, options.spread), self.negative(options), generators

    @property
    def samples(self) -> bool:
        """Whether one prompt has many embeddings: adapters with a noise token, and diffusion."""
        return self.adapter is not None and self.adapter.samples

    @torch.no_grad()
    def embed(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator] | None = None, spread: float = 0.0
    ) -> Tensor:
        """Prompts to raw image embeddings `(len(prompts), D)`; warns of prompts that are cut.

        Each prompt is embedded by itself, so that its embedding does not depend on what else is drawn.

        Args:
            prompts: B texts.
            generators: B generators for adapters that sample, and for `spread`.
            spread: Share of noise, see `Adapter.spread`.

        Raises:
            CSDiffError: an embedding is not finite, or a spread without an adapter or with one that samples.
        """
        if spread and self.adapter is None:
            raise CSDiffError("spread: the raw text embedding has no whitened space to draw in; leave --spread out.")
        rows, before = [], None
        for row, prompt in enumerate(prompts):
            # Images of one prompt are neighbours.
            if prompt != before:
                if said := self.cut(prompt):
                    logger.warning(said)
                text, before = self.encoder.encode([prompt]), prompt
            embeds = text.embeds
            if self.adapter is not None:
                drawn = {"generator": generators[row]} if generators and (self.samples or spread) else {}
                drawn |= {"spread": spread} if spread else {}
                embeds = self.adapter.embed(text.embeds.float(), text.states.float(), text.mask, **drawn)
            cure = "the adapter was trained on too little data or has diverged, train it again"
            if self.adapter is None:
                cure = f"copy the text encoder {self.text_encoder['id']} again"
            _check_finite(embeds, repr(prompt), cure)
            rows.append(embeds.to(self.dtype))
        return torch.cat(rows)

    @torch.no_grad()
    def negative(self, options: GenerateConfig) -> Tensor | None:
        """The decoder's negative `(1, D)`: the embedded negative prompt, or what the decoder was trained with.

        For Kandinsky 2.2 that is the embedding of all-zero pixels, for FLUX.1's IP-Adapters that of a black image.
        None for the others, whose own default is zeros, and where nothing guides by it.
        """
        kind = self.decoder.hand_over
        if (options.true_cfg if kind == "flux-ip-adapter" else options.guidance) <= 1:
            return None
        if options.negative_prompt is not None:
            return self.embed([options.negative_prompt])
        if kind not in ("kandinsky", "flux-ip-adapter"):
            return None
        black = self.image_tower.blank()[None]
        embeds = self.image_tower.forward(torch.zeros_like(black) if kind == "kandinsky" else black)
        cure = f"copy {self.image_tower.id} again, or give --negative_prompt"
        _check_finite(embeds.embeds, "a black image", cure)
        return embeds.embeds.to(self.dtype)

    @cached_property
    def image_tower(self) -> ImageEncoder:
        """The image encoder whose embeddings the decoder takes; decoder or adapter must name it."""
        where = f"the decoder {self.decoder.source}"
        if not (self.image_encoder or {}).get("id"):
            raise CSDiffError(
                f"Neither {where} nor the adapter names an image encoder, which guidance needs for its default "
                "negative, and an upload for its embedding; give --negative_prompt, or --guidance 1."
            )
        known = find_encoder(self.image_encoder, "image", None, where)
        return load_image_encoder(known["id"], self.device, self.dtype, revision=known.get("revision"))

    def cut(self, prompt: str) -> str | None:
        """A sentence on the end of a prompt that the text encoder does not read; None where it reads all of it."""
        (length,), limit = self.encoder.caption_tokenizer.lengths([prompt]), self.encoder.max_length
        if length <= limit:
            return None
        ids = self.encoder.tokenizer(prompt, verbose=False).input_ids
        end = self.encoder.tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
        return (
            f"The prompt {prompt[:60]!r} has {length} tokens, the text encoder reads {limit}; this end is cut off: "
            f"{end if len(end) <= 60 else end[:60] + '...'!r}"
        )


def noise(seed: int) -> torch.Generator:
    """Random numbers of one image: those of its seed on every device, whatever else is drawn."""
    return torch.Generator("cpu").manual_seed(seed)


def known_text_encoder(card: AdapterCard | None, decoder: DecoderSource, given: str | None = None) -> dict:
    """Where the text encoder is that the adapter names, else the decoder's; the one given must be the same."""
    known = (card.metadata.get("text_encoder") if card else None) or decoder.text_encoder
    return find_encoder(known, "text", given, f"the adapter {card.path}" if card else f"the decoder {decoder.source}")


def text_encoder_options(encoder: dict, metadata: dict) -> dict:
    """`revision`, `pooling` and `max_length` with which `load_text_encoder` encodes as the training of an adapter did.

    `encoder` is what is known of the encoder, `{"id", "revision", "pooling", ...}`, `metadata` the adapter's record.
    """
    cut = (metadata.get("tokenizer") or {}).get("max_length")
    return {"revision": encoder.get("revision"), "pooling": encoder.get("pooling"), "max_length": cut}


def _check_finite(embeds: Tensor, what: str, cure: str) -> None:
    if not embeds.isfinite().all():
        raise CSDiffError(
            f"The image embedding of {what} is not finite: expected numbers, found NaN or infinity; {cure}."
        )
