"""An adapter with its encoders as a stock diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from csdiff.adapters.base import Adapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import DecoderSource, check_pairing
from csdiff.pipelines.loading import load_adapter
from csdiff.pipelines.pairing import AdapterCard
from csdiff.pipelines.scheduler import OneShotScheduler


def prior_pipeline(adapter: Adapter, dtype: torch.dtype):
    """A `KandinskyV22PriorPipeline` of the adapter and the encoders that its `csdiff.json` names.

    Raises:
        CSDiffError: An encoder that is not named or not there, or a text encoder without a CLIP projection.
    """
    from diffusers import KandinskyV22PriorPipeline

    named = {tower: adapter.metadata.get(f"{tower}_encoder") or {} for tower in ("text", "image")}
    for tower, encoder in named.items():
        if not encoder.get("id"):
            raise CSDiffError(
                f"format: a prior has a text and an image encoder, but the adapter's csdiff.json names no {tower} "
                "encoder; use --format adapter."
            )
    limit = (adapter.metadata.get("tokenizer") or {}).get("max_length")
    text = load_text_encoder(
        named["text"]["id"], dtype=dtype, revision=named["text"].get("revision"), max_length=limit
    )
    if text.pooling != "projection":
        raise CSDiffError(
            f"format: expected a CLIP text encoder, whose projection a prior pipeline reads, found "
            f"{named['text']['id']} with {text.pooling} pooling; use --format adapter."
        )
    image = load_image_encoder(named["image"]["id"], dtype=dtype, revision=named["image"].get("revision"))
    # the adapter stands in for itself until `load_adapter` has checked it and chosen the scheduler
    pipe = KandinskyV22PriorPipeline(
        prior=adapter,
        image_encoder=image.model,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=OneShotScheduler(),
        image_processor=image.processor,
    )
    return load_adapter(pipe, adapter)


def combined_pipeline(prior, card: AdapterCard, decoder: DecoderSource, dtype: torch.dtype):
    """A `KandinskyV22CombinedPipeline` of a prior pipeline and a decoder.

    Raises:
        CSDiffError: A decoder of another kind, or one that the adapter does not fit.
        OSError: Files of the decoder are missing.
    """
    from diffusers import KandinskyV22CombinedPipeline, KandinskyV22Pipeline

    from csdiff.pipelines.decoding import load_pipeline

    check_decoder(card, decoder)
    parts = load_pipeline(KandinskyV22Pipeline, decoder, dtype)
    return KandinskyV22CombinedPipeline(
        unet=parts.unet,
        scheduler=parts.scheduler,
        movq=parts.movq,
        **{f"prior_{name}": part for name, part in prior.components.items()},
    )


def check_decoder(card: AdapterCard, decoder: DecoderSource) -> None:
    """Refuses, before anything is loaded, a decoder that makes no pipeline with this adapter."""
    if decoder.hand_over != "kandinsky":
        raise CSDiffError(
            f"decoder: expected a Kandinsky 2.2 decoder for a pipeline folder, found {decoder.class_name} in "
            f"{decoder.source}; `csdiff generate` and load_adapter drive the other ones."
        )
    check_pairing(card, decoder)


def readme(folder: Path, class_name: str, adapter: Adapter) -> str:
    """A card that says how to load the folder."""
    module = type(adapter).__module__
    prior = class_name == "KandinskyV22PriorPipeline"
    loader = class_name if prior else "AutoPipelineForText2Image"
    prefix = "" if prior else "prior_"
    once = f", {prefix}guidance_scale=1.0, {prefix}num_inference_steps=1" if adapter.one_shot else ""
    result = 'image_embeds, negative_image_embeds = pipe("a red apple"{once}).to_tuple()'
    if not prior:
        result = 'pipe("a red apple"{once}).images[0].save("apple.png")'
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: diffusers",
            "tags: [csdiff, unclip, prior]",
            "---",
            "",
            f"# {folder.name}",
            "",
            f"A `{class_name}` whose prior is a csdiff `{type(adapter).__name__}`. diffusers takes classes of other",
            "packages only from imported modules, so import csdiff's first:",
            "",
            "```python",
            f"from diffusers import {loader}",
            "",
            f"import {module}, csdiff.pipelines.scheduler",
            "",
            f'pipe = {loader}.from_pretrained("PATH")',
            result.replace("{once}", once),
            "```",
            "",
        ]
    )
