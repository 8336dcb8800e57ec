"""Writing a store from tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from csdiff.embeddings.writer import StoreWriter
from csdiff.errors import CSDiffError


def write_store(
    path: str | Path,
    *,
    text_embeds: Tensor | None = None,
    image_embeds: Tensor | None = None,
    text_states: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    captions: Sequence[str] | None = None,
    image_ids: Sequence[str] | None = None,
    fingerprint: dict | None = None,
    dtype: str = "float16",
    shard_size: int = 10000,
) -> None:
    """Write a store from tensors in memory.

    Args:
        path: New folder.
        text_embeds: `(N, Dt)`.
        image_embeds: `(N, D)`.
        text_states: `(N, L, H)`.
        text_mask: `(N, L)` bool.
        image_tokens: `(N, V, H)`.
        captions: N captions.
        image_ids: N names; rows of one image share one.
        fingerprint: What is known of the encoders; `kind`, `dtype`, statistics and checksums are added.
        dtype: "float16", "bfloat16" or "float32".
        shard_size: Rows a shard.

    Raises:
        CSDiffError: No embeddings, columns of different lengths, or a folder that is in use.
    """
    given = {
        "text_embeds": text_embeds,
        "image_embeds": image_embeds,
        "text_states": text_states,
        "text_mask": text_mask,
        "image_tokens": image_tokens,
    }
    columns = {key: value for key, value in given.items() if value is not None}
    texts = {name: list(v) for name, v in (("caption", captions), ("image_id", image_ids)) if v is not None}
    lengths = {name: len(values) for name, values in {**columns, **texts}.items()}
    if (
        not {"text_embeds", "image_embeds"} & columns.keys()
        or len(set(lengths.values())) != 1
        or not min(lengths.values())
    ):
        raise CSDiffError(f"{path}: expected text or image embeddings, all columns of one length, found {lengths}.")
    count = next(iter(lengths.values()))
    plan = {"rows": count, "dtype": dtype, "shard_size": shard_size}
    with StoreWriter(path, -(-count // shard_size), dtype) as writer:
        if writer.begin(plan):
            raise CSDiffError(f"{path} holds a store already; choose another folder, or delete it first.")
        for shard in range(writer.shards):
            part = slice(shard * shard_size, (shard + 1) * shard_size)
            arrays = writer.arrays(shard, columns, "stage")
            arrays.append({key: column[part] for key, column in columns.items()})
            metadata = pa.table({name: pa.array(v[part], pa.string()) for name, v in texts.items()}) if texts else None
            writer.stage(shard, arrays, metadata, {})
            writer.publish(shard, writer.arrays(shard, [], "publish"))
        writer.finish({**writer.fingerprint(plan), **(fingerprint or {})}, {"rows": count})
