"""Six small pictures, and the same with captions."""

import json
import shutil

import pytest
from tiny import make_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six readable PNGs `0.png` to `5.png`, in a folder without captions."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), 6)
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def captioned(pictures, tmp_path):
    """The pictures with `metadata.jsonl`: two captions for picture 0, one for the others."""
    folder = shutil.copytree(pictures, tmp_path / "captioned")
    rows = [{"file_name": f"{i}.png", "text": f"thing {i}", "style": "flat"} for i in range(6)]
    rows.insert(1, {"file_name": "0.png", "text": "thing zero", "style": "flat"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder
