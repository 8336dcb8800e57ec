"""A captioned image folder that is embedded in seconds, and an uninterrupted store of it."""

import json

import numpy as np
import pytest
from embedding_runs import PICTURES, config
from PIL import Image

from csdiff.embeddings import EmbeddingStore, embed


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Thirteen pictures: 3 is no image, 5 is missing, 7 has an empty caption beside a good one, 2 a very long one.

    Beside them lie two files that are no images, and two that systems leave.
    """
    folder = tmp_path_factory.mktemp("dataset")
    draw = np.random.default_rng(0)
    rows = []
    for index in range(PICTURES):
        name = f"{index:02d}.png"
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": [f"thing {index}", f"a thing {index}"]})
    rows[2]["text"] = "a very long caption of a thing that no encoder could ever take in as a whole"
    rows[7]["text"] = ["  ", "thing 7"]
    (folder / "03.png").write_bytes(b"no image")
    (folder / "05.png").unlink()
    for name in ("a.heic", "b.heic", "._00.png", "Thumbs.db"):
        (folder / name).write_bytes(b"\x00\x01 no image")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="session")
def store(dataset, tiny_clip, tmp_path_factory):
    """The store of the data set, made in one go."""
    output = tmp_path_factory.mktemp("stores") / "whole"
    embed(config(dataset, tiny_clip, output))
    return output


@pytest.fixture
def embedded(dataset, tiny_clip, tmp_path):
    """Embeds the data set or another source with options of `config`, and opens the store."""

    def run(name="s", source=dataset, **options):
        embed(config(source, tiny_clip, tmp_path / name, **options))
        return EmbeddingStore.open(tmp_path / name)

    return run
