"""Making the shards of a store: items are decoded, their rows decided, images and captions encoded."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import MAX_CAPTION, Item, Problem, Source, well_formed
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.image_encoder import load_image_encoder
from csdiff.embeddings.text_encoder import CaptionTokenizer, load_text_encoder
from csdiff.embeddings.writer import ShardWriter, StoreWriter
from csdiff.errors import CSDiffError

# The report lists this many cut captions by name; all are counted.
LISTED_TRUNCATIONS = 20
# A handful of bad entries stops nobody, whatever part of a small data set they are.
ALWAYS_ALLOWED = 10
# Captions are sorted by length within this many batches.
SORTED_BATCHES = 16

T, U = TypeVar("T"), TypeVar("U")


class Extraction:
    """Encoders, and the threads that decode and encode; makes shards one after another.

    On a CPU every thread that torch would use takes whole batches instead of parts of one product: none waits for
    another, and the bytes do not depend on their number.
    """

    def __init__(self, config: EmbedConfig, source: Source, writer: StoreWriter, towers: list[str], device, state):
        self.config, self.source, self.writer, self.state = config, source, writer, state
        dtype = None if config.precision == "auto" else getattr(torch, config.precision)
        self.image = self.text = None
        self.keys, self.facts = [], {}
        if "text" in towers:
            options = {"pooling": config.pooling, "max_length": config.max_length}
            self.text = load_text_encoder(config.text_encoder, device, dtype, revision=config.text_revision, **options)
            self.keys += ["text_embeds", *(["text_states", "text_mask"] if config.text_states else ())]
            self.facts["text_encoder"] = self.text.describe(weights=False)
            self.facts["tokenizer"] = self.text.caption_tokenizer.describe()
        if "image" in towers:
            self.image = load_image_encoder(config.image_encoder, device, dtype, revision=config.image_revision)
            self.keys += ["image_embeds", *(["image_tokens"] if config.image_tokens else ())]
            self.facts["image_encoder"] = self.image.describe(weights=False)
            self.facts["preprocessing"] = self.image.describe_preprocessing()
        done = [writer.record(shard) for shard in range(writer.shards) if writer.done(shard)]
        self._problems = sum(len(record["problems"]) for record in done)
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1

    def run(self, shards: list[int]) -> None:
        """Make these shards."""
        from tqdm import tqdm

        known, processes = self.source.count, self.state.num_processes
        total = None if known is None else sum(len(self.source.span(n, self.config.shard_size)) for n in shards)
        share = "" if processes == 1 else f" (process 1 of {processes})"
        # None: a bar on a terminal, nothing in a log file
        disable = None if self.config.progress and self.state.is_main_process else True
        options = {"unit": " items", "dynamic_ncols": True, "smoothing": 0.05, "disable": disable}
        self.decoders = ThreadPoolExecutor(self.config.workers, thread_name_prefix="decode")
        self.encoders = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")
        torch_threads = torch.get_num_threads()
        try:
            if self._threads > 1:
                torch.set_num_threads(1)
            with tqdm(total=total, desc=f"Embedding{share}", **options) as bar:
                for number, shard in enumerate(shards, 1):
                    self._shard(shard, bar)
                    if known is None:
                        # Only the shards read so far tell how long the others are.
                        bar.total = round(bar.n * len(shards) / number)
        finally:
            for pool in (self.decoders, self.encoders):
                pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch_threads)

    def _shard(self, number: int, bar) -> None:
        rows = ShardRows(self.config, self.text and self.text.caption_tokenizer)
        with self.writer.shard(number, self.keys) as shard:
            batches = self._batches(number, rows, bar)
            if self.image is None:
                deque(batches, maxlen=0)
            else:
                for columns in _in_order(self.encoders, self._encode_images, batches, 2 * self._threads):
                    shard.append(columns)
                if not rows.rows:
                    blank = self._encode_images(([self.image.blank()], [1]))
                    shard.append({key: column[:0] for key, column in blank.items()})
            if self.text is not None:
                self._captions(rows, shard)
            shard.metadata = rows.table(self.source.has_captions)
            shard.notes = self.facts | rows.to_dict()
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
                count = rows.add(item)
                if count:
                    pixels.append(values)
                    repeats.append(count)
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
        size, count = self.config.batch_size, len(rows.rows)
        for start in range(0, max(count, 1), size * SORTED_BATCHES):
            part = slice(start, start + size * SORTED_BATCHES)
            captions = [row["caption"] for row in rows.rows[part]] or [""]
            order = torch.tensor(rows.lengths[part] or [0]).argsort(stable=True)
            batches = [[captions[i] for i in places.tolist()] for places in order.split(size)]
            encoded = list(_in_order(self.encoders, self._encode_captions, batches, len(batches)))
            for key in encoded[0]:
                column = torch.cat([columns[key] for columns in encoded])
                shard.append({key: column[order.argsort()][:count]})

    def _encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        if not self.config.text_states:
            return {"text_embeds": self.text.embed(captions).cpu()}
        encoding = self.text.encode(captions)
        states = encoding.states.cpu()
        return {"text_embeds": encoding.embeds.cpu(), "text_states": states, "text_mask": encoding.mask.cpu()}


class ShardRows:
    """Which captions of its items become rows of a shard, and what is left out.

    Without the tokenizer of a text encoder, items without captions are kept.
    """

    def __init__(self, config: EmbedConfig, tokenizer: CaptionTokenizer | None):
        self.config, self.tokenizer = config, tokenizer
        self.rows: list[dict] = []
        self.lengths: list[int] = []
        self.items = self.replaced = 0
        self.problems: list[Problem] = []
        self.truncated: list[str] = []

    def add(self, item: Item) -> int:
        """Add one row for each caption of use, or one without a caption; how many. What is wrong is noted."""
        captions, counts, before = self._usable(item), [], len(self.rows)
        if self.tokenizer is not None and captions:
            counts = self.tokenizer.lengths([text for _, text in captions])
        elif self.tokenizer is None:
            captions = captions or [(None, None)]
            counts = [0] * len(captions)
        for (place, text), count in zip(captions, counts, strict=True):
            if self.tokenizer is not None and count > self.tokenizer.max_length:
                found = f"caption {place} has {count} tokens"
                if self.config.long_captions == "skip":
                    detail = f"{found}, the text encoder takes {self.tokenizer.max_length}"
                    self.problems.append(Problem(item.id, "long_caption", detail))
                    continue
                self.truncated.append(well_formed(f"{item.id}: {found}"))
            row = {"caption": text, "image_id": item.id, "image_path": item.path, "caption_index": place}
            row |= {name: item.extra.get(name) for name in self.config.metadata_columns}
            # Names of files may be no text either.
            self.rows.append({k: well_formed(v) if isinstance(v, str) else v for k, v in row.items()})
            self.lengths.append(count)
        return len(self.rows) - before

    def _usable(self, item: Item) -> list[tuple[int, str]]:
        """Captions that are neither blank nor huge, with their place, as many as are asked for."""
        if not item.captions and self.tokenizer is not None:
            self.problems.append(Problem(item.id, "no_caption", "the image has no caption"))
        kept = []
        for place, caption in enumerate(item.captions):
            text = well_formed(caption).strip()
            if len(text) > MAX_CAPTION:
                detail = f"caption {place} has {len(text):,} characters and begins {text[:40]!r}"
                self.problems.append(Problem(item.id, "huge_caption", detail))
            elif text:
                self.replaced += "\ufffd" in text
                kept.append((place, text))
            else:
                self.problems.append(Problem(item.id, "empty_caption", f"caption {place} is {caption!r}"))
        if self.config.captions_per_image == "random" and kept:
            digest = hashlib.sha256(f"{self.config.seed}/{item.id}".encode(errors="surrogatepass")).digest()
            return [kept[int.from_bytes(digest[:8], "little") % len(kept)]]
        return kept[:1] if self.config.captions_per_image == "first" else kept

    def table(self, has_captions: bool) -> pa.Table:
        """Metadata of the rows."""
        types = {"caption": pa.string(), "image_id": pa.string(), "image_path": pa.string()}
        types |= {"caption_index": pa.int32(), **dict.fromkeys(self.config.metadata_columns, pa.string())}
        table = pa.Table.from_pylist(self.rows, pa.schema(types))
        return table if has_captions else table.drop_columns(["caption", "caption_index"])

    def to_dict(self) -> dict:
        """What the report needs of this shard."""
        return {
            "items": self.items,
            "rows": len(self.rows),
            "problems": [[well_formed(text) for text in (p.id, p.reason, p.detail)] for p in self.problems],
            "replaced": self.replaced,
            "truncated": len(self.truncated),
            "truncated_listed": self.truncated[:LISTED_TRUNCATIONS],
        }


def check_limit(config: EmbedConfig, problems: int, items: int, example: Problem) -> None:
    """Refuse to go on when more than `max_skipped` of the items, and more than ten, were left out."""
    if problems <= (max(config.max_skipped * items, ALWAYS_ALLOWED) if config.max_skipped > 0 else 0):
        return
    raise CSDiffError(
        f"{config.source}: expected at most {config.max_skipped:.1%} of {items:,} items to be left out (max_skipped), "
        f"found {problems:,} already, for example {example.id}: {example.reason.replace('_', ' ')} "
        f"({example.detail}); look at the data, or raise max_skipped and run again: what is done is kept."
    )


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """Results of a function in a pool, in the order of the items, with at most `ahead` of them waiting."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
