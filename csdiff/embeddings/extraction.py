"""Encoding a data set into an embedding store: on any number of processes, interrupted or not, the same bytes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch

from csdiff.data.images import DECODING
from csdiff.data.items import REASONS, Problem
from csdiff.data.opening import open_source
from csdiff.data.sources import Source
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.encoders import encoder_files
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.embeddings.image_encoder import ImageEncoder
from csdiff.embeddings.layout import REPORT_FILE
from csdiff.embeddings.passes import CaptionPass, ImagePass, check_limit
from csdiff.embeddings.rows import report
from csdiff.embeddings.text_encoder import TextEncoder
from csdiff.embeddings.writer import StoreWriter
from csdiff.errors import CSDiffError

# Options that decide the content of a store; the others may change between an interruption and its continuation.
CONTENT_OPTIONS = (
    "captions_per_image", "seed", "long_captions", "max_length", "pooling", "dtype", "text_states", "image_tokens",
    "shard_size", "batch_size", "precision", "metadata_columns",
)  # fmt: skip


@dataclass(frozen=True)
class EmbedReport:
    """What became of a data set.

    Attributes:
        output: Folder of the store.
        items: Items of the source.
        rows: Rows of the store.
        skipped: How many images and captions were left out, by reason.
        truncated_captions: How many captions were cut.
        replaced_captions: How many captions hold U+FFFD, in place of what was no character.
        not_read: How many files of the source's folder were neither images nor captions, by ending.
        seconds: Time this run took.
    """

    output: Path
    items: int
    rows: int
    skipped: dict[str, int]
    truncated_captions: int
    replaced_captions: int
    not_read: dict[str, int]
    seconds: float


def embed(config: EmbedConfig) -> EmbedReport:
    """Encode a data set once into an embedding store.

    Works in two passes over the shards, one encoder at a time: images are decoded and encoded and with that the rows
    are decided, then captions are encoded and the shard becomes visible. Each shard is made by one process from start
    to end, so the number of processes changes no byte; a run that was killed goes on with the first step that is not
    whole. The store holds `report.json` with everything that was left out.

    Args:
        config: Every option.

    Raises:
        CSDiffError: Bad input: nothing to read, no such encoder, a folder in use or made with other options, more
            left out than `max_skipped` allows, or nothing left. Found as far as possible before anything is written.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    started = time.monotonic()
    if not config.source or not config.output:
        raise CSDiffError("source, output: expected a data set and a folder for the store, found nothing; give both.")
    source = open_source(
        config.source,
        split=config.split,
        subset=config.subset,
        captions_file=config.captions_file,
        image_column=config.image_column,
        caption_column=config.caption_column,
        metadata_columns=config.metadata_columns,
        allow_outside=config.allow_outside,
    )
    with_images = bool(config.image_encoder) and source.has_images
    with_text = bool(config.text_encoder) and source.has_captions
    if not with_images and not with_text:
        found = " and ".join(["images"] * source.has_images + ["captions"] * source.has_captions) or "neither"
        raise CSDiffError(f"{config.source}: expected images or captions for the encoders named, found {found}.")
    units = source.units(config.shard_size)
    if units == 0:
        raise CSDiffError(f"{config.source}: expected at least one item, found none.")
    # Ranks do not finish together, and nothing is exchanged before they all have.
    # Without `cpu`, accelerate takes every process of a CPU launch for the only one.
    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available(), timeout=timedelta(days=7))
    device = config.device or state.device
    if config.text_encoder and not with_text and state.is_main_process:
        print(f"{config.source} has no captions: only its images are embedded.", file=sys.stderr)
    with state.main_process_first():
        text_files = encoder_files(config.text_encoder, "text", config.text_revision) if with_text else None
        image_files = encoder_files(config.image_encoder, "image", config.image_revision) if with_images else None

    tokenizer = None
    if with_text:
        _, tokenizer, _ = TextEncoder.inspect(config.text_encoder, text_files, config.pooling, config.max_length)
    if with_images:
        ImageEncoder.inspect(config.image_encoder, image_files)

    with StoreWriter(config.output, units, config.dtype) as writer:
        finished = [False]
        if state.is_main_process:
            finished = [writer.begin(_plan(config, source, text_files, image_files))]
        broadcast_object_list(finished)
        if not finished[0]:
            images = ImagePass(config, source, writer, image_files, tokenizer, device)
            captions = CaptionPass(config, writer, text_files, device)
            unstaged = [shard for shard in range(writer.shards) if not writer.staged(shard)]
            unpublished = [shard for shard in range(writer.shards) if not writer.published(shard)]
            state.wait_for_everyone()
            rank, world = state.process_index, state.num_processes
            mine = unstaged[rank::world]
            images.run(mine, state)
            # Shards staged by another process of this run are finished by that process.
            ready = [shard for shard in unpublished if shard not in set(unstaged)]
            captions.run(sorted(mine + ready[rank::world]), state)
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(config, source, writer, with_images, with_text)
            state.wait_for_everyone()
    content = _read_report(config)
    result = EmbedReport(
        output=Path(config.output),
        items=content["items"],
        rows=content["rows"],
        skipped=content["skipped"],
        truncated_captions=content["truncated_captions"],
        replaced_captions=content["replaced_captions"],
        not_read={ending: entry["count"] for ending, entry in content["not_read"].items()},
        seconds=time.monotonic() - started,
    )
    if state.is_main_process:
        print(_summary(result, finished[0]), file=sys.stderr)
    return result


def _plan(config: EmbedConfig, source: Source, text_files, image_files) -> dict:
    """Everything that decides the content of the store."""
    plan = {
        "source": source.identity(),
        "decoding": DECODING,
        **{name: asdict(config)[name] for name in CONTENT_OPTIONS},
    }
    for tower, files, id in (("text", text_files, config.text_encoder), ("image", image_files, config.image_encoder)):
        plan[f"{tower}_encoder"] = None
        if files is not None:
            weights = weights_sha256(files.model, tower)
            plan[f"{tower}_encoder"] = {"id": str(id), "revision": files.revision, "weights_sha256": weights}
    return plan


def _finish(config: EmbedConfig, source: Source, writer: StoreWriter, with_images: bool, with_text: bool) -> None:
    import numpy
    import transformers

    shards = [writer.rows(shard) for shard in range(writer.shards)]
    content = report(shards)
    if content["problems"]:
        check_limit(config, len(content["problems"]), content["items"], Problem(**content["problems"][-1]))
    if content["rows"] == 0:
        raise CSDiffError(
            f"{config.source}: expected at least one usable item, found none: {_skipped(content['skipped'])}."
        )
    plan = writer.plan()
    notes = writer.record(0)["notes"]
    fingerprint = {
        **writer.fingerprint(plan),
        "text_encoder": {**plan["text_encoder"], **notes["text_encoder"]} if with_text else None,
        "image_encoder": {**plan["image_encoder"], **shards[0]["image_encoder"]} if with_images else None,
        "tokenizer": notes.get("tokenizer"),
        "preprocessing": {"decoding": DECODING, **shards[0]["preprocessing"]} if with_images else None,
        "versions": {m.__name__: m.__version__ for m in (numpy, torch, transformers)},
    }
    content = {"source": config.source, **content, "reasons": {k: REASONS[k] for k in content["skipped"]}}
    content["not_read"] = source.not_read
    writer.finish(fingerprint, content)


def _read_report(config: EmbedConfig) -> dict:
    return json.loads((Path(config.output) / REPORT_FILE).read_text(encoding="utf-8"))


def _skipped(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items()) or "nothing left out"


def _summary(result: EmbedReport, finished: bool) -> str:
    done = "is complete already" if finished else f"in {result.seconds:.0f} s"
    left_out = f"; left out: {_skipped(result.skipped)}, see report.json" if result.skipped else ""
    cut = f"; {result.truncated_captions:,} long captions were cut" if result.truncated_captions else ""
    mended = f"; {result.replaced_captions:,} captions hold U+FFFD in place of half a character"
    mended = mended if result.replaced_captions else ""
    endings = ", ".join(f"{count:,} {ending}" for ending, count in result.not_read.items())
    other = f"; not an image: {endings}" if endings else ""
    return f"{result.output}: {result.rows:,} rows of {result.items:,} items {done}{left_out}{cut}{mended}{other}"
