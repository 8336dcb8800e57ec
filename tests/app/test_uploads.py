"""Uploads: what is no image, or too large a one, is said in a sentence before it is decoded."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csdiff.app.drawing import LARGEST_SIDE, read_upload
from csdiff.app.inspection import gather
from csdiff.errors import CSDiffError


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("content", [b"not an image", b"", png_header(60000, 60000), png_header(64, 64)])
def test_bad_images_are_a_sentence(tmp_path, content):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(CSDiffError, match=r"upload\.png cannot be read as an image") as error:
        read_upload(path)
    assert "\n" not in str(error.value)


def test_pictures_are_made_small_and_rgb(tmp_path):
    Image.fromarray(np.zeros((3000, 1500, 4), np.uint8)).save(tmp_path / "a.png")
    picture = read_upload(tmp_path / "a.png")
    assert (picture.mode, picture.size) == ("RGB", (LARGEST_SIDE // 2, LARGEST_SIDE))


def test_folder_is_put_together_without_pickles(tmp_path):
    names = ["img_emb_0.npy", "text_emb_12.npy", "metadata_0.parquet", "csdiff.json", "pytorch_model.bin"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    folder = gather([str(tmp_path / name) for name in names])
    found = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    assert found == {
        "img_emb/img_emb_0.npy",
        "text_emb/text_emb_12.npy",
        "metadata/metadata_0.parquet",
        "csdiff.json",
    }


def test_files_of_nothing_known(tmp_path):
    (tmp_path / "virus.exe").write_bytes(b"x")
    with pytest.raises(CSDiffError, match=r"virus\.exe"):
        gather([str(tmp_path / "virus.exe")])
