"""Encoding a data set into an embedding store: on any number of processes, interrupted or not, the same bytes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch

from csdiff.data.images import DECODING
from csdiff.data.items import HOW_TO_CAPTION, REASONS, Problem, Source
from csdiff.data.opening import open_source
from csdiff.devices import choose_device
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.encoders import encoder_files
from csdiff.embeddings.image_encoder import inspect_image_encoder
from csdiff.embeddings.shards import LISTED_TRUNCATIONS, Extraction, check_limit
from csdiff.embeddings.store_files import REPORT_FILE
from csdiff.embeddings.text_encoder import inspect_text_encoder
from csdiff.embeddings.writer import StoreWriter
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.options import check_options

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


def embed(config: EmbedConfig, source: Source | None = None) -> EmbedReport:
    """Encode a data set once into an embedding store.

    Each shard is made by one process from start to end: its images are decoded and encoded and with that its rows are
    decided, then their captions are encoded. So the number of processes changes no byte, and a run that was killed
    goes on with the first shard that is not whole. The store holds `report.json` with everything that was left out.

    Args:
        config: Every option.
        source: The data set, where it is open already.

    Raises:
        CSDiffError: Bad input: nothing to read, no such encoder, a folder in use or made with other options, more
            left out than `max_skipped` allows, or nothing left. Found as far as possible before anything is written.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    started = time.monotonic()
    _check(config)
    names = ("split", "subset", "captions_file", "image_column", "caption_column", "metadata_columns", "allow_outside")
    source = source or open_source(config.source, **{name: getattr(config, name) for name in names})
    has = {"text": source.has_captions, "image": source.has_images}
    towers = [tower for tower in has if has[tower] and getattr(config, f"{tower}_encoder")]
    if not towers:
        found = " and ".join(["images"] * source.has_images + ["captions"] * source.has_captions) or "neither"
        raise CSDiffError(f"{config.source}: expected images or captions for the encoders named, found {found}.")
    units = source.units(config.shard_size)
    # Ranks do not finish together, and nothing is exchanged before they all have.
    # Without `cpu`, accelerate takes every process of a CPU launch for the only one.
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    device = state.device if config.device == "auto" else choose_device(config.device)
    if config.text_encoder and "text" not in towers and state.is_main_process:
        print(f"{config.source} has no captions: only its images are embedded; {HOW_TO_CAPTION}.", file=sys.stderr)
    if config.image_encoder and "image" not in towers and state.is_main_process:
        use = "which serve as --data.unpaired_text; to train on pairs, name a dataset with images"
        print(f"{config.source} has no images: only its captions are embedded, {use}.", file=sys.stderr)
    with state.main_process_first():
        identities = {tower: _identity(config, tower) for tower in towers}
    plan = {
        "source": source.identity(),
        **{name: asdict(config)[name] for name in CONTENT_OPTIONS},
        "decoding": DECODING if "image" in towers else None,
        # The weights, not their names: an encoder that was moved makes the same store.
        **{f"{tower}_encoder": identities.get(tower, {}).get("weights_sha256") for tower in ("text", "image")},
    }
    with StoreWriter(config.output, units, config.dtype) as writer:
        finished = [state.is_main_process and writer.begin(plan)]
        broadcast_object_list(finished)
        if not finished[0]:
            todo = [shard for shard in range(units) if not writer.done(shard)]
            state.wait_for_everyone()
            mine = todo[state.process_index :: state.num_processes]
            if mine:
                try:
                    Extraction(config, source, writer, towers, device, state).run(mine)
                except BaseException as error:
                    if state.is_main_process and not isinstance(error, Exception):  # Ctrl-C, SIGTERM
                        kept = f"{sum(map(writer.done, range(units))):,} of {units:,} shards are kept"
                        print(f"{writer.path}: {kept}; the same command goes on from there.", file=sys.stderr)
                    raise
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(config, source, writer, identities)
            state.wait_for_everyone()
    content = read_json(writer.path / REPORT_FILE)
    names = ("items", "rows", "skipped", "truncated_captions", "replaced_captions")
    not_read = {ending: entry["count"] for ending, entry in content["not_read"].items()}
    seconds = time.monotonic() - started
    result = EmbedReport(writer.path, **{n: content[n] for n in names}, not_read=not_read, seconds=seconds)
    if state.is_main_process:
        print(_summary(result, finished[0]), file=sys.stderr)
    return result


def _check(config: EmbedConfig) -> None:
    check_options(config)
    needed = {"source": "a data set", "output": "a folder for the store"}
    if missing := [name for name in needed if not getattr(config, name)]:
        expected, options = " and ".join(needed[n] for n in missing), " and ".join(f"--{n}" for n in missing)
        raise CSDiffError(f"{', '.join(missing)}: expected {expected}, found nothing; give {options}.")
    if not config.text_encoder and not config.image_encoder:
        raise CSDiffError("text_encoder, image_encoder: expected at least one encoder, found none; name one.")
    for option, tower in (("text_states", "text"), ("image_tokens", "image")):
        if getattr(config, option) and not getattr(config, f"{tower}_encoder"):
            raise CSDiffError(f"{option}: expected an encoder of that side, found none; name a {tower}_encoder.")


def _identity(config: EmbedConfig, tower: str) -> dict:
    """Name, revision and hash of an encoder, which is looked at but not loaded."""
    files = encoder_files(getattr(config, f"{tower}_encoder"), tower, getattr(config, f"{tower}_revision"))
    if tower == "text":
        inspect_text_encoder(files, config.pooling, config.max_length)
    else:
        inspect_image_encoder(files)
    return files.identity(tower)


def _finish(config: EmbedConfig, source: Source, writer: StoreWriter, identities: dict[str, dict]) -> None:
    import numpy
    import transformers

    shards = [writer.record(shard) for shard in range(writer.shards)]
    problems = [Problem(*problem) for shard in shards for problem in shard["problems"]]
    items, rows, truncated, replaced = (
        sum(shard[name] for shard in shards) for name in ("items", "rows", "truncated", "replaced")
    )
    skipped = dict(sorted(Counter(problem.reason for problem in problems).items()))
    if problems:
        check_limit(config, len(problems), items, problems[-1])
    if rows == 0:
        found = _counts(skipped) or "it is empty"
        raise CSDiffError(f"{config.source}: expected at least one usable item, found none: {found}.")
    towers = {tower: identities[tower] | shards[0][f"{tower}_encoder"] for tower in identities}
    fingerprint = {
        "text_encoder": towers.get("text"),
        "image_encoder": towers.get("image"),
        "tokenizer": shards[0].get("tokenizer"),
        "preprocessing": {"decoding": DECODING, **shards[0]["preprocessing"]} if "image" in towers else None,
        "versions": {module.__name__: module.__version__ for module in (numpy, torch, transformers)},
    }
    report = {
        "source": config.source,
        "items": items,
        "rows": rows,
        "skipped": skipped,
        "truncated_captions": truncated,
        "replaced_captions": replaced,
        "problems": [asdict(problem) for problem in problems],
        "truncated": [line for shard in shards for line in shard["truncated_listed"]][:LISTED_TRUNCATIONS],
        "reasons": {reason: REASONS[reason] for reason in skipped},
        "not_read": source.not_read,
    }
    writer.finish(fingerprint, report)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} ({count:,})" for name, count in counts.items())


def _summary(result: EmbedReport, finished: bool) -> str:
    done = "is complete already" if finished else f"in {result.seconds:.0f} s"
    parts = {
        f"{result.output}: {result.rows:,} rows of {result.items:,} items {done}": True,
        f"left out: {_counts(result.skipped)}, see report.json": result.skipped,
        f"{result.truncated_captions:,} long captions were cut": result.truncated_captions,
        f"{result.replaced_captions:,} captions hold U+FFFD in place of half a character": result.replaced_captions,
        f"not an image: {_counts(result.not_read)}": result.not_read,
    }
    return "; ".join(part for part, said in parts.items() if said)
