"""Encoding a data set into an embedding store: on any number of processes, interrupted or not, the same bytes."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from csdiff.data.images import DECODING, UnreadableImage, decode_image
from csdiff.data.items import REASONS, Item, Problem, Source
from csdiff.data.opening import open_source
from csdiff.devices import choose_device
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.encoders import encoder_files, encoder_name
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.embeddings.image_encoder import ImageEncoder, inspect_image_encoder, load_image_encoder
from csdiff.embeddings.layout import REPORT_FILE
from csdiff.embeddings.rows import ShardRows, report
from csdiff.embeddings.text_encoder import TextEncoder, inspect_text_encoder, load_text_encoder
from csdiff.embeddings.writer import ShardWriter, StoreWriter
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.options import check_options

# Options that decide the content of a store; the others may change between an interruption and its continuation.
CONTENT_OPTIONS = (
    "captions_per_image", "seed", "long_captions", "max_length", "pooling", "dtype", "text_states", "image_tokens",
    "shard_size", "batch_size", "precision", "metadata_columns",
)  # fmt: skip
# A handful of bad entries stops nobody, whatever part of a small data set they are.
ALWAYS_ALLOWED = 10
# Captions are sorted by length within this many batches.
SORTED_BATCHES = 16

T, U = TypeVar("T"), TypeVar("U")


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

    Each shard is made by one process from start to end: its images are decoded and encoded and with that its rows are
    decided, then their captions are encoded. So the number of processes changes no byte, and a run that was killed
    goes on with the first shard that is not whole. The store holds `report.json` with everything that was left out.

    Args:
        config: Every option.

    Raises:
        CSDiffError: Bad input: nothing to read, no such encoder, a folder in use or made with other options, more
            left out than `max_skipped` allows, or nothing left. Found as far as possible before anything is written.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    started = time.monotonic()
    _check(config)
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
    towers = [tower for tower in ("text", "image") if getattr(config, f"{tower}_encoder")]
    towers = [tower for tower in towers if (source.has_captions if tower == "text" else source.has_images)]
    if not towers:
        found = " and ".join(["images"] * source.has_images + ["captions"] * source.has_captions) or "neither"
        raise CSDiffError(f"{config.source}: expected images or captions for the encoders named, found {found}.")
    units = source.units(config.shard_size)
    if units == 0:
        raise CSDiffError(f"{config.source}: expected at least one item, found none.")
    # Ranks do not finish together, and nothing is exchanged before they all have.
    # Without `cpu`, accelerate takes every process of a CPU launch for the only one.
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    device = state.device if config.device == "auto" else choose_device(config.device)
    if config.text_encoder and "text" not in towers and state.is_main_process:
        print(f"{config.source} has no captions: only its images are embedded.", file=sys.stderr)
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
                with Extraction(config, source, writer, towers, device, state) as extraction:
                    extraction.run(mine)
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(config, source, writer, plan, identities)
            state.wait_for_everyone()
    content = read_json(writer.path / REPORT_FILE)
    names = ("items", "rows", "skipped", "truncated_captions", "replaced_captions")
    not_read = {ending: entry["count"] for ending, entry in content["not_read"].items()}
    seconds = time.monotonic() - started
    result = EmbedReport(writer.path, **{n: content[n] for n in names}, not_read=not_read, seconds=seconds)
    if state.is_main_process:
        print(_summary(result, finished[0]), file=sys.stderr)
    return result


class Extraction:
    """Encoders, and the threads that decode and encode; makes shards one after another.

    On a CPU every thread that torch would use takes whole batches instead of parts of one product: none waits for
    another, and the bytes do not depend on their number.
    """

    def __init__(self, config: EmbedConfig, source: Source, writer: StoreWriter, towers: list[str], device, state):
        self.config, self.source, self.writer, self.state = config, source, writer, state
        dtype = None if config.precision == "auto" else getattr(torch, config.precision)
        self.image: ImageEncoder | None = None
        self.text: TextEncoder | None = None
        if "image" in towers:
            self.image = load_image_encoder(config.image_encoder, device, dtype, revision=config.image_revision)
        if "text" in towers:
            options = {"pooling": config.pooling, "max_length": config.max_length}
            self.text = load_text_encoder(config.text_encoder, device, dtype, revision=config.text_revision, **options)
        self.keys = ["text_embeds"] if self.text else []
        self.keys += ["text_states", "text_mask"] if self.text and config.text_states else []
        self.keys += ["image_embeds"] if self.image else []
        self.keys += ["image_tokens"] if self.image and config.image_tokens else []
        done = [writer.record(shard) for shard in range(writer.shards) if writer.done(shard)]
        self._problems = sum(len(record["problems"]) for record in done)
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._torch_threads = torch.get_num_threads()

    def __enter__(self) -> Extraction:
        if self._threads > 1:
            torch.set_num_threads(1)
        self.decoders = ThreadPoolExecutor(self.config.workers, thread_name_prefix="decode")
        self.encoders = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self.decoders, self.encoders):
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def run(self, shards: list[int]) -> None:
        """Make these shards."""
        size, known = self.config.shard_size, self.source.count
        total = None if known is None else sum(min(size, known - shard * size) for shard in shards)
        with _progress_bar(self.config, self.state, total) as bar:
            for number, shard in enumerate(shards, 1):
                self._shard(shard, bar)
                if known is None:
                    # Only the shards read so far tell how long the others are.
                    bar.total = round(bar.n * len(shards) / number)

    def _shard(self, number: int, bar) -> None:
        config = self.config
        rows = ShardRows(config, self.text and self.text.caption_tokenizer)
        with self.writer.shard(number, self.keys) as shard:
            if self.image is None:
                for _ in self._batches(number, rows, bar):
                    pass
            else:
                ahead = 2 * self._threads
                for columns in _in_order(self.encoders, self._encode_images, self._batches(number, rows, bar), ahead):
                    shard.append(columns)
                if len(rows) == 0:
                    blank = self._encode_images(([self.image.blank()], [1]))
                    shard.append({key: column[:0] for key, column in blank.items()})
            if self.text is not None:
                self._captions(rows, shard)
            shard.metadata = rows.table(self.source.has_captions)
            shard.notes = rows.to_dict()
            if self.image is not None:
                shard.notes["image_encoder"] = self.image.describe(weights=False)
                shard.notes["preprocessing"] = self.image.describe_preprocessing()
            if self.text is not None:
                shard.notes["text_encoder"] = self.text.describe(weights=False)
                shard.notes["tokenizer"] = self.text.describe_tokenizer()
        self._problems += len(rows.problems)

    def _batches(self, number: int, rows: ShardRows, bar) -> Iterator[tuple[list[Tensor], list[int]]]:
        """Decides the rows of a shard; gives the pixels of its images in batches, with the rows of each."""
        config = self.config
        items = self.source.read(number, config.shard_size)
        pixels, repeats = [], []
        for item, values in _in_order(self.decoders, self._decode, items, config.batch_size + config.workers):
            rows.items += 1
            bar.update()
            if isinstance(item, Problem):
                rows.problems.append(item)
            else:
                captions = rows.usable(item)
                if captions or self.text is None:
                    rows.add(item, captions)
                    pixels.append(values)
                    repeats.append(max(len(captions), 1))
            # A source that does not know its size is judged at the end.
            if rows.problems and self.source.count is not None:
                check_limit(config, self._problems + len(rows.problems), self.source.count, rows.problems[-1])
            if len(pixels) == config.batch_size:
                yield pixels, repeats
                pixels, repeats = [], []
        if pixels:
            yield pixels, repeats

    def _decode(self, item: Item | Problem) -> tuple[Item | Problem, Tensor | None]:
        if self.image is None or isinstance(item, Problem):
            return item, None
        if item.image is None:
            return Problem(item.id, "missing_image", "the entry has no image"), None
        try:
            return item, self.image.preprocess([decode_image(item.image)])[0]
        except UnreadableImage as error:
            return Problem(item.id, "unreadable_image", str(error)), None

    @torch.no_grad()
    def _encode_images(self, batch: tuple[list[Tensor], list[int]]) -> dict[str, Tensor]:
        pixels, repeats = batch
        encoding = self.image.forward(torch.stack(pixels))
        columns = {"image_embeds": encoding.embeds, "image_tokens": encoding.tokens}
        places = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats))
        return {key: column.cpu()[places] for key, column in columns.items() if key in self.keys}

    def _captions(self, rows: ShardRows, shard: ShardWriter) -> None:
        """Encodes captions of one length together, as padding costs as much as text, and stores them in order."""
        size = self.config.batch_size
        for start in range(0, max(len(rows.captions), 1), size * SORTED_BATCHES):
            captions = rows.captions[start : start + size * SORTED_BATCHES] or [""]
            lengths = torch.tensor(rows.lengths[start : start + size * SORTED_BATCHES] or [0])
            order = lengths.argsort(stable=True)
            batches = [[captions[i] for i in part.tolist()] for part in order.split(size)]
            encoded = list(_in_order(self.encoders, self._encode_captions, batches, len(batches)))
            count = len(captions) if rows.captions else 0
            for key in encoded[0]:
                column = torch.cat([part[key] for part in encoded])
                shard.append({key: column[order.argsort()][:count]})

    def _encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        if not self.config.text_states:
            return {"text_embeds": self.text.embed(captions).cpu()}
        encoding = self.text.encode(captions)
        states = encoding.states.cpu()
        return {"text_embeds": encoding.embeds.cpu(), "text_states": states, "text_mask": encoding.mask.cpu()}


def check_limit(config: EmbedConfig, problems: int, items: int, example: Problem) -> None:
    """Refuse to go on when too much was left out.

    Raises:
        CSDiffError: More than `max_skipped` of the items, and more than ten of them.
    """
    allowed = config.max_skipped * items
    if problems <= (max(allowed, ALWAYS_ALLOWED) if config.max_skipped > 0 else 0):
        return
    raise CSDiffError(
        f"{config.source}: expected at most {config.max_skipped:.1%} of {items:,} items to be left out (max_skipped), "
        f"found {problems:,} already, for example {example.id}: {example.reason.replace('_', ' ')} "
        f"({example.detail}); look at the data, or raise max_skipped and run again: what is done is kept."
    )


def _check(config: EmbedConfig) -> None:
    check_options(config)
    if not config.source or not config.output:
        raise CSDiffError("source, output: expected a data set and a folder for the store, found nothing; give both.")
    if not config.text_encoder and not config.image_encoder:
        raise CSDiffError("text_encoder, image_encoder: expected at least one encoder, found none; name one.")
    if config.text_states and not config.text_encoder:
        raise CSDiffError("text_states: expected a text encoder, found none; name one with text_encoder.")
    if config.image_tokens and not config.image_encoder:
        raise CSDiffError("image_tokens: expected an image encoder, found none; name one with image_encoder.")


def _identity(config: EmbedConfig, tower: str) -> dict:
    """Name, revision and hash of an encoder, which is looked at but not loaded."""
    id, revision = getattr(config, f"{tower}_encoder"), getattr(config, f"{tower}_revision")
    files = encoder_files(id, tower, revision)
    if tower == "text":
        inspect_text_encoder(id, files, config.pooling, config.max_length)
    else:
        inspect_image_encoder(id, files)
    return {
        "id": encoder_name(id), "revision": files.revision, "weights_sha256": weights_sha256(files.model, tower)
    }  # fmt: skip


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """Results of a function in a pool, in the order of the items, with at most `ahead` of them waiting."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _progress_bar(config: EmbedConfig, state, total: int | None):
    from tqdm import tqdm

    share = "" if state.num_processes == 1 else f" (process 1 of {state.num_processes})"
    return tqdm(
        total=total,
        desc=f"Embedding{share}",
        unit=" items",
        dynamic_ncols=True,
        smoothing=0.05,
        # None: a bar on a terminal, nothing in a log file
        disable=None if config.progress and state.is_main_process else True,
    )


def _finish(config: EmbedConfig, source: Source, writer: StoreWriter, plan: dict, identities: dict[str, dict]) -> None:
    import numpy
    import transformers

    shards = [writer.record(shard) for shard in range(writer.shards)]
    content = report(shards)
    if content["problems"]:
        check_limit(config, len(content["problems"]), content["items"], Problem(**content["problems"][-1]))
    if content["rows"] == 0:
        raise CSDiffError(
            f"{config.source}: expected at least one usable item, found none: {_skipped(content['skipped'])}."
        )
    notes = shards[0]
    fingerprint = {
        **{
            f"{tower}_encoder": {**identities[tower], **notes[f"{tower}_encoder"]} if tower in identities else None
            for tower in ("text", "image")
        },
        "tokenizer": notes.get("tokenizer"),
        "preprocessing": {"decoding": DECODING, **notes["preprocessing"]} if "image" in identities else None,
        "versions": {module.__name__: module.__version__ for module in (numpy, torch, transformers)},
    }
    content = {"source": config.source, **content, "reasons": {key: REASONS[key] for key in content["skipped"]}}
    content["not_read"] = source.not_read
    writer.finish(plan, fingerprint, content)


def _skipped(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items()) or "nothing left out"


def _summary(result: EmbedReport, finished: bool) -> str:
    done = "is complete already" if finished else f"in {result.seconds:.0f} s"
    left_out = f"; left out: {_skipped(result.skipped)}, see report.json" if result.skipped else ""
    cut = f"; {result.truncated_captions:,} long captions were cut" if result.truncated_captions else ""
    replaced = f"; {result.replaced_captions:,} captions hold U+FFFD in place of half a character"
    replaced = replaced if result.replaced_captions else ""
    endings = ", ".join(f"{count:,} {ending}" for ending, count in result.not_read.items())
    other = f"; not an image: {endings}" if endings else ""
    return f"{result.output}: {result.rows:,} rows of {result.items:,} items {done}{left_out}{cut}{replaced}{other}"
