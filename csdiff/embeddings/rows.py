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
    """Collects the rows of one shard; without the tokenizer of a text encoder, items without captions are kept."""

    def __init__(self, config: EmbedConfig, tokenizer: CaptionTokenizer | None):
        self.config, self.tokenizer = config, tokenizer
        self.captions: list[str] = []
        self.lengths: list[int] = []
        self.items = self.replaced = 0
        self.problems: list[Problem] = []
        self.truncated: list[str] = []
        self._rows: list[dict] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, item: Item) -> int:
        """Add one row for each caption of use, or one without a caption; how many. What is wrong is noted."""
        captions = self._fitting(item, self._usable(item))
        if not captions and self.tokenizer is not None:
            return 0
        for place, text, count in captions or [(None, None, 0)]:
            if text is not None:
                self.captions.append(text)
                self.lengths.append(count)
            row = {"caption": text, "image_id": item.id, "image_path": item.path, "caption_index": place}
            row |= {name: item.extra.get(name) for name in self.config.metadata_columns}
            # Names of files may be no text either.
            self._rows.append({k: well_formed(v) if isinstance(v, str) else v for k, v in row.items()})
        return max(len(captions), 1)

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

    def _fitting(self, item: Item, captions: list[tuple[int, str]]) -> list[tuple[int, str, int]]:
        """Those that the text encoder takes, with their tokens."""
        if self.tokenizer is None or not captions:
            return [(place, text, 0) for place, text in captions]
        fitting, limit = [], self.tokenizer.max_length
        counts = self.tokenizer.lengths([text for _, text in captions])
        for (place, text), count in zip(captions, counts, strict=True):
            found = f"caption {place} has {count} tokens"
            if count > limit and self.config.long_captions == "skip":
                self.problems.append(Problem(item.id, "long_caption", f"{found}, the text encoder takes {limit}"))
                continue
            if count > limit:
                self.truncated.append(well_formed(f"{item.id}: {found}"))
            fitting.append((place, text, count))
        return fitting

    def table(self, has_captions: bool) -> pa.Table:
        """Metadata of the rows."""
        types = {"caption": pa.string(), "image_id": pa.string(), "image_path": pa.string()}
        types |= {"caption_index": pa.int32(), **dict.fromkeys(self.config.metadata_columns, pa.string())}
        table = pa.Table.from_pylist(self._rows, pa.schema(types))
        return table if has_captions else table.drop_columns(["caption", "caption_index"])

    def to_dict(self) -> dict:
        """What the report needs of this shard."""
        problems = [[well_formed(text) for text in (p.id, p.reason, p.detail)] for p in self.problems]
        return {
            "items": self.items,
            "rows": len(self),
            "problems": problems,
            "replaced": self.replaced,
            "truncated": len(self.truncated),
            "truncated_listed": self.truncated[:LISTED_TRUNCATIONS],
        }


def report(shards: Sequence[dict]) -> dict:
    """The report of a whole store from those of its shards."""
    problems = [problem for shard in shards for problem in shard["problems"]]
    counts = {name: sum(shard[name] for shard in shards) for name in ("items", "rows", "truncated", "replaced")}
    return {
        "items": counts["items"],
        "rows": counts["rows"],
        "skipped": dict(sorted(Counter(reason for _, reason, _ in problems).items())),
        "truncated_captions": counts["truncated"],
        "replaced_captions": counts["replaced"],
        "problems": [{"id": id, "reason": reason, "detail": detail} for id, reason, detail in problems],
        "truncated": [line for shard in shards for line in shard["truncated_listed"]][:LISTED_TRUNCATIONS],
    }
