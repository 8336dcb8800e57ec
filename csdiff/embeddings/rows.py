"""Which captions of an item become rows of a store, and what is left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa

from csdiff.data.items import MAX_CAPTION, Item, Problem

# A shard's report lists this many cut captions by name; all are counted.
LISTED_TRUNCATIONS = 20


class ShardRows:
    """Collects the rows of one shard.

    Args:
        captions: "all", "first" or "random": which usable captions of an item become rows.
        seed: Of the random one, which depends on it and on the item's id only.
        required: Items without any caption are left out.
        token_counts: Number of tokens of some captions; None when there is no tokenizer.
        max_length: Tokens a caption may have.
        skip_long: Longer captions are left out rather than cut.
        extra_columns: Further columns of the items to keep.
    """

    def __init__(
        self,
        captions: str,
        seed: int,
        required: bool,
        token_counts: Callable[[Sequence[str]], list[int]] | None,
        max_length: int,
        skip_long: bool,
        extra_columns: Sequence[str] = (),
    ):
        self.which, self.seed, self.required = captions, seed, required
        self.token_counts, self.max_length, self.skip_long = token_counts, max_length, skip_long
        self.items = 0
        self.problems: list[Problem] = []
        self.truncated: list[str] = []
        self.replaced = 0
        self._columns: dict[str, list] = {
            name: [] for name in ("caption", "image_id", "image_path", "caption_index", *extra_columns)
        }
        self._extra = list(extra_columns)

    def __len__(self) -> int:
        return len(self._columns["image_id"])

    def usable(self, item: Item) -> list[tuple[int, str]]:
        """Captions of an item that become rows, each with its place; what is wrong with the others is noted."""
        if not item.captions and self.required:
            self.problem(Problem(item.id, "no_caption", "the image has no caption"))
        kept = []
        for place, caption in enumerate(item.captions):
            if len(caption) > MAX_CAPTION:
                detail = f"caption {place} has {len(caption):,} characters and begins {caption[:40]!r}"
                self.problem(Problem(item.id, "huge_caption", detail))
            elif caption.strip():
                self.replaced += "\ufffd" in caption
                kept.append((place, caption.strip()))
            else:
                self.problem(Problem(item.id, "empty_caption", f"caption {place} is {caption!r}"))
        if self.which == "first":
            kept = kept[:1]
        elif self.which == "random" and kept:
            digest = hashlib.sha256(f"{self.seed}/{item.id}".encode()).digest()
            kept = [kept[int.from_bytes(digest[:8], "little") % len(kept)]]
        if self.token_counts is None or not kept:
            return kept
        counts = self.token_counts([caption for _, caption in kept])
        fitting = []
        for (place, caption), count in zip(kept, counts, strict=True):
            if count > self.max_length and self.skip_long:
                detail = f"caption {place} has {count} tokens, the text encoder takes {self.max_length}"
                self.problem(Problem(item.id, "long_caption", detail))
                continue
            if count > self.max_length:
                self.truncated.append(f"{item.id}: caption {place} has {count} tokens")
            fitting.append((place, caption))
        return fitting

    def add(self, item: Item, captions: list[tuple[int, str]]) -> None:
        """Add one row for each caption, or one without a caption."""
        for place, caption in captions or [(None, None)]:
            values = {"caption": caption, "image_id": item.id, "image_path": item.path, "caption_index": place}
            for name, value in {**values, **{name: item.extra.get(name) for name in self._extra}}.items():
                self._columns[name].append(value)

    def problem(self, problem: Problem) -> None:
        self.problems.append(problem)

    def table(self, has_captions: bool) -> pa.Table:
        """Metadata of the rows."""
        types = {"caption_index": pa.int32()}
        columns = {name: pa.array(v, types.get(name, pa.string())) for name, v in self._columns.items()}
        if not has_captions:
            del columns["caption"], columns["caption_index"]
        return pa.table(columns)

    def to_dict(self) -> dict:
        """What the report needs of this shard."""
        return {
            "items": self.items,
            "rows": len(self),
            "problems": [[problem.id, problem.reason, problem.detail] for problem in self.problems],
            "truncated": len(self.truncated),
            "replaced": self.replaced,
            "truncated_listed": self.truncated[:LISTED_TRUNCATIONS],
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
