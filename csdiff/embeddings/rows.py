"""Which captions of an item become rows of a store, and what is left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from csdiff.data.items import MAX_CAPTION, Item, Problem, well_formed
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.tokenizer import CaptionTokenizer

# A shard's report lists this many cut captions by name; all are counted.
LISTED_TRUNCATIONS = 20


class ShardRows:
    """Collects the rows of one shard.

    Args:
        config: Which captions of an item are kept, and what becomes of long ones.
        tokenizer: Of the text encoder; None keeps items without captions.

    Attributes:
        captions: Of the rows that have one, in order.
        lengths: Their tokens, with a tokenizer.
        items: Items seen.
        problems: What was left out.
    """

    def __init__(self, config: EmbedConfig, tokenizer: CaptionTokenizer | None):
        self.config, self.tokenizer = config, tokenizer
        self.captions: list[str] = []
        self.lengths: list[int] = []
        self.items = self.replaced = 0
        self.problems: list[Problem] = []
        self.truncated: list[str] = []
        self._columns: dict[str, list] = {
            name: [] for name in ("caption", "image_id", "image_path", "caption_index", *config.metadata_columns)
        }

    def __len__(self) -> int:
        return len(self._columns["image_id"])

    def usable(self, item: Item) -> list[tuple[int, str, int]]:
        """Captions of an item that become rows, with place and tokens; what is wrong with the others is noted."""
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
                kept.append((place, text, 0))
            else:
                self.problems.append(Problem(item.id, "empty_caption", f"caption {place} is {caption!r}"))
        if self.config.captions_per_image == "first":
            kept = kept[:1]
        elif self.config.captions_per_image == "random" and kept:
            digest = hashlib.sha256(f"{self.config.seed}/{item.id}".encode(errors="surrogatepass")).digest()
            kept = [kept[int.from_bytes(digest[:8], "little") % len(kept)]]
        if self.tokenizer is None or not kept:
            return kept
        fitting = []
        for (place, text, _), count in zip(kept, self.tokenizer.lengths([text for _, text, _ in kept]), strict=True):
            if count > self.tokenizer.max_length and self.config.long_captions == "skip":
                detail = f"caption {place} has {count} tokens, the text encoder takes {self.tokenizer.max_length}"
                self.problems.append(Problem(item.id, "long_caption", detail))
                continue
            if count > self.tokenizer.max_length:
                self.truncated.append(f"{item.id}: caption {place} has {count} tokens")
            fitting.append((place, text, count))
        return fitting

    def add(self, item: Item, captions: list[tuple[int, str, int]]) -> None:
        """Add one row for each caption, or one without a caption."""
        for place, text, count in captions or [(None, None, 0)]:
            if text is not None:
                self.captions.append(text)
                self.lengths.append(count)
            values = {"caption": text, "image_id": item.id, "image_path": item.path, "caption_index": place}
            for name, value in {**values, **{n: item.extra.get(n) for n in self.config.metadata_columns}}.items():
                # Names of files may be no text either.
                self._columns[name].append(well_formed(value) if isinstance(value, str) else value)

    def table(self, has_captions: bool) -> pa.Table:
        """Metadata of the rows."""
        types = {"caption_index": pa.int32()}
        columns = {name: pa.array(v, types.get(name, pa.string())) for name, v in self._columns.items()}
        if not has_captions:
            del columns["caption"], columns["caption_index"]
        return pa.table(columns)

    def to_dict(self) -> dict:
        """What the report needs of this shard."""
        problems = [[problem.id, problem.reason, problem.detail] for problem in self.problems]
        return {
            "items": self.items,
            "rows": len(self),
            "problems": [[well_formed(text) for text in problem] for problem in problems],
            "replaced": self.replaced,
            "truncated": len(self.truncated),
            "truncated_listed": [well_formed(line) for line in self.truncated[:LISTED_TRUNCATIONS]],
        }


def report(shards: Sequence[dict]) -> dict:
    """The report of a whole store from those of its shards."""
    problems = [problem for shard in shards for problem in shard["problems"]]
    return {
        "items": sum(shard["items"] for shard in shards),
        "rows": sum(shard["rows"] for shard in shards),
        "skipped": dict(sorted(Counter(reason for _, reason, _ in problems).items())),
        "truncated_captions": sum(shard["truncated"] for shard in shards),
        "replaced_captions": sum(shard["replaced"] for shard in shards),
        "problems": [{"id": id, "reason": reason, "detail": detail} for id, reason, detail in problems],
        "truncated": [line for shard in shards for line in shard["truncated_listed"]][:LISTED_TRUNCATIONS],
    }
