"""The two passes of an extraction: images decide the rows of a shard, captions complete it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item, Problem
from csdiff.data.sources import Source
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.encoders import EncoderFiles, load_image_encoder, load_text_encoder
from csdiff.embeddings.rows import ShardRows
from csdiff.embeddings.writer import ShardArrays, StoreWriter
from csdiff.errors import CSDiffError

# A handful of bad entries stops nobody, whatever part of a small data set they are.
ALWAYS_ALLOWED = 10


class ImagePass:
    """Reads the items of a shard, encodes the images, and stages the rows that are left.

    Without an image encoder it only decides the rows.
    """

    def __init__(
        self,
        config: EmbedConfig,
        source: Source,
        writer: StoreWriter,
        image_files: EncoderFiles | None,
        tokenizer,
        device,
    ):
        self.config, self.source, self.writer, self.device = config, source, writer, device
        self.image_files, self.tokenizer = image_files, tokenizer
        self.keys = ["image_embeds"] if image_files else []
        if image_files and config.image_tokens:
            self.keys.append("image_tokens")
        self.encoder = None
        self._problems = 0

    def run(self, shards: list[int], state) -> None:
        """Stage shards."""
        if not shards:
            return
        staged = [self.writer.rows(shard) for shard in range(self.writer.shards) if self.writer.staged(shard)]
        self._problems = sum(len(rows["problems"]) for rows in staged)
        if self.image_files is not None:
            self.encoder = load_image_encoder(
                self.config.image_encoder,
                self.device,
                precision(self.config),
                revision=self.config.image_revision,
            )
        known = self.source.count
        total = (
            None
            if known is None
            else sum(min(self.config.shard_size, known - s * self.config.shard_size) for s in shards)
        )
        with (
            ThreadPoolExecutor(self.config.workers) as pool,
            progress_bar(self.config, state, "images" if self.encoder else "items", total) as bar,
        ):
            for number, shard in enumerate(shards, 1):
                self._stage(shard, pool, bar)
                if known is None:
                    # Only the shards read so far tell how long the others are.
                    bar.total = round(bar.n * len(shards) / number)
        self.encoder = None
        _free(self.device)

    def _stage(self, shard: int, pool: ThreadPoolExecutor, bar) -> None:
        config = self.config
        rows = ShardRows(
            config.captions_per_image,
            config.seed,
            self.tokenizer is not None,
            None if self.tokenizer is None else self._token_counts,
            0 if self.tokenizer is None else self.tokenizer.max_length,
            config.long_captions == "skip",
            config.metadata_columns,
        )
        arrays = self.writer.arrays(shard, self.keys, "stage")
        batch: list[tuple[Item, list, object]] = []
        for item, pixels in self._decoded(self.source.read(shard, config.shard_size), pool):
            rows.items += 1
            bar.update()
            if isinstance(item, Problem):
                rows.problem(item)
            else:
                captions = rows.usable(item)
                if captions or self.tokenizer is None:
                    batch.append((item, captions, pixels))
                    if len(batch) == config.batch_size:
                        self._add(batch, rows, arrays)
                        batch = []
            if rows.problems:
                self._check_limit(rows)
        self._add(batch, rows, arrays)
        notes = {"image_encoder": None, "preprocessing": None}
        if self.encoder is not None:
            described = self.encoder.describe(weights=False)
            notes = {"image_encoder": described, "preprocessing": self.encoder.describe_preprocessing()}
            if len(rows) == 0:
                arrays.append(self._encode([self.encoder.blank()], [0]))
        has_captions = self.source.has_captions
        self.writer.stage(shard, arrays, rows.table(has_captions), {**rows.to_dict(), **notes})
        self._problems += len(rows.problems)

    def _decoded(self, items: Iterator[Item | Problem], pool: ThreadPoolExecutor) -> Iterator[tuple]:
        """Items in order with their pixels, decoded ahead in threads."""
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(self._decode, item))
            if len(ahead) > self.config.batch_size + self.config.workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, item: Item | Problem) -> tuple:
        if self.encoder is None or isinstance(item, Problem):
            return item, None
        if item.image is None:
            return Problem(item.id, "missing_image", "the entry has no image"), None
        try:
            return item, self.encoder.preprocess([decode_image(item.image)])[0]
        except UnreadableImage as error:
            return Problem(item.id, "unreadable_image", str(error)), None

    def _add(self, batch: list, rows: ShardRows, arrays: ShardArrays) -> None:
        if not batch:
            return
        if self.encoder is not None:
            arrays.append(self._encode([pixels for _, _, pixels in batch], [max(len(c), 1) for _, c, _ in batch]))
        for item, captions, _ in batch:
            rows.add(item, captions)

    @torch.no_grad()
    def _encode(self, pixels: list, repeats: list[int]) -> dict:
        encoding = self.encoder.forward(torch.stack(filled(pixels, self.config.batch_size)))
        places = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats)).to(encoding.embeds.device)
        columns = {"image_embeds": encoding.embeds, "image_tokens": encoding.tokens}
        return {key: columns[key][places].cpu() for key in self.keys}

    def _token_counts(self, captions: list[str]) -> list[int]:
        return self.tokenizer.lengths(captions)

    def _check_limit(self, rows: ShardRows) -> None:
        """Stop as soon as this process alone knows of too many problems; all of them are counted at the end."""
        # A source that does not know its size is judged at the end.
        if self.source.count is not None:
            check_limit(self.config, self._problems + len(rows.problems), self.source.count, rows.problems[-1])


class CaptionPass:
    """Encodes the captions of staged shards and publishes them."""

    def __init__(self, config: EmbedConfig, writer: StoreWriter, files: EncoderFiles | None, device):
        self.config, self.writer, self.files, self.device = config, writer, files, device
        self.keys = ["text_embeds"] if files else []
        if files and config.text_states:
            self.keys += ["text_states", "text_mask"]

    def run(self, shards: list[int], state) -> None:
        """Publish shards."""
        todo = [shard for shard in shards if self.writer.record(shard) is None]
        encoder = None
        if todo and self.files is not None:
            encoder = load_text_encoder(
                self.config.text_encoder,
                self.device,
                precision(self.config),
                revision=self.config.text_revision,
                pooling=self.config.pooling,
                max_length=self.config.max_length,
            )
        total = sum(self.writer.rows(shard)["rows"] for shard in todo)
        with progress_bar(self.config, state, "captions", total if encoder else 0) as bar:
            for shard in shards:
                if self.writer.record(shard) is None:
                    self._publish(shard, encoder, bar)
                self.writer.show(shard)
        _free(self.device)

    def _publish(self, shard: int, encoder, bar) -> None:
        arrays = self.writer.arrays(shard, self.keys, "publish")
        notes = {}
        if encoder is not None:
            captions = self.writer.captions(shard)
            for start in range(0, len(captions), self.config.batch_size):
                batch = captions[start : start + self.config.batch_size]
                arrays.append(self._encode(encoder, batch))
                bar.update(len(batch))
            if not captions:
                arrays.append({key: column[:0] for key, column in self._encode(encoder, ["a"]).items()})
            notes = {"text_encoder": encoder.describe(weights=False), "tokenizer": encoder.describe_tokenizer()}
        self.writer.publish(shard, arrays, notes)

    def _encode(self, encoder, captions: list[str]) -> dict:
        count, captions = len(captions), filled(captions, self.config.batch_size)
        if not self.config.text_states:
            return {"text_embeds": encoder.embed(captions)[:count].cpu()}
        encoding = encoder.encode(captions)
        columns = {"text_embeds": encoding.embeds, "text_states": encoding.states, "text_mask": encoding.mask}
        return {key: columns[key][:count].cpu() for key in self.keys}


def filled(batch: list, size: int) -> list:
    """A batch filled up with its last entry: matrix products of one shape round alike, on any number of threads."""
    return batch + batch[-1:] * (size - len(batch))


def precision(config: EmbedConfig) -> torch.dtype | None:
    """Of the encoders' weights."""
    return None if config.precision == "auto" else getattr(torch, config.precision)


def progress_bar(config: EmbedConfig, state, unit: str, total: int | None):
    """Bar on stderr with rate and time left, of the first process."""
    from tqdm import tqdm

    share = "" if state.num_processes == 1 else f" (process 1 of {state.num_processes})"
    return tqdm(
        total=total,
        desc=f"Embedding {unit}{share}",
        unit=f" {unit}",
        dynamic_ncols=True,
        smoothing=0.05,
        # None: a bar on a terminal, nothing in a log file
        disable=None if config.progress and state.is_main_process and total != 0 else True,
    )


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


def _free(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
