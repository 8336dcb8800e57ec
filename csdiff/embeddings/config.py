"""Every option of `csdiff embed`: the command line, the YAML file, the help text and the checks come from here."""

from dataclasses import dataclass, field
from typing import Literal

from csdiff.options import ClosedUnitInterval, PositiveInt, Seed


@dataclass
class EmbedConfig:
    """Encode captions and images once into an embedding store."""

    source: str = ""
    """Captions and images: an image folder, a caption table, a parquet file with images, webdataset shards, a folder
    written by `datasets`, or a data set id on the hub."""
    output: str = ""
    """Folder of the store; an interrupted run into the same folder goes on where it was."""
    text_encoder: str | None = "tiny-clip"
    """Text encoder (folder, hub id or tiny-clip); null embeds no text."""
    image_encoder: str | None = "tiny-clip"
    """Image encoder (folder, hub id or tiny-clip); null embeds no images."""
    text_revision: str | None = None
    """Commit, tag or branch of the text encoder on the hub."""
    image_revision: str | None = None
    """Commit, tag or branch of the image encoder on the hub."""
    split: str = "train"
    """Split of a data set that has several; all for every file of a folder."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    captions_file: str | None = None
    """Table of captions for an image folder, when it does not lie in the folder as metadata.jsonl, .csv or
    .parquet."""
    image_column: str | None = None
    """Column of images or image files; the usual names are tried by default."""
    caption_column: str | None = None
    """Column of captions; the usual names are tried by default."""
    metadata_columns: list[str] = field(default_factory=list)
    """Further columns of the source to keep in the store's metadata, as text."""
    allow_outside: bool = False
    """Read images that a table or a row of the source names outside its folder (`../x.png`, `/data/x.png`); without it
    they are left out and counted."""
    captions_per_image: Literal["all", "first", "random"] = "all"
    """Which captions of an image become rows: all (the image embedding is repeated), the first, or one by the seed."""
    seed: Seed = 0
    """Of the random caption."""
    long_captions: Literal["truncate", "skip"] = "truncate"
    """Captions of more tokens than the text encoder takes are cut, or left out; both are counted."""
    max_length: PositiveInt | None = None
    """Tokens a caption may have; by default the tokenizer's limit, at most 512."""
    pooling: Literal["projection", "mean", "last", "cls"] | None = None
    """How token states become one text embedding; by default what fits the encoder."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored embeddings."""
    text_states: bool = False
    """Also store the token states of the text encoder, for adapters that read them (77 times the space for CLIP)."""
    image_tokens: bool = False
    """Also store the token states of the image encoder, for the token-level term."""
    shard_size: PositiveInt = 10000
    """Items of the source in a shard, the unit of work; webdataset shards stay as they are."""
    batch_size: PositiveInt = 64
    """Images or captions a forward pass; on a CPU each of its threads takes a batch of its own."""
    max_skipped: ClosedUnitInterval = 0.1
    """The run stops when more than this part of the items is left out; ten are always allowed unless it is 0."""
    device: str = "auto"
    """Device of the encoders: auto (the accelerator of the process, else the CPU), cpu, cuda, mps, ..."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the encoders; auto is float32 on the CPU and the checkpoint's own elsewhere."""
    workers: PositiveInt = 4
    """Threads a process that decode images."""
    progress: bool = True
    """Show a progress bar on stderr."""
