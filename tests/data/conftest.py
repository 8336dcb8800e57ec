"""Six small pictures, and the same with captions."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six readable PNGs `0.png` to `5.png`, in a folder without captions."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def captioned(pictures, tmp_path):
    """The pictures with `metadata.jsonl`: two captions for picture 0, one for the others."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"thing {i}", "style": "flat"} for i in range(6)]
    rows.insert(1, {"file_name": "0.png", "text": "thing zero", "style": "flat"})
    for picture in pictures.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder
