"""Configurations of `embed` that the tests vary, and what it leaves behind; as a script `embed` in a process."""

import json
import sys

from csdiff.embeddings import EmbedConfig, embed

PICTURES = 13


def config(dataset, clip, output, **options):
    """The configuration that the tests vary: four shards of four items."""
    values = {"shard_size": 4, "batch_size": 3, "device": "cpu", "progress": False, "workers": 2}
    encoders = {"text_encoder": str(clip), "image_encoder": str(clip)}
    return EmbedConfig(**{"source": str(dataset), "output": str(output), **encoders, **values, **options})


def content(folder):
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    embed(EmbedConfig(**json.loads(sys.argv[1])))
