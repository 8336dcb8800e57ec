"""A folder as people have it: images among fifty kinds of other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from embedding_runs import config
from PIL import Image

from csdiff.embeddings import EmbeddingStore, embed

KINDS = """
heic docx pdf svg psd_old zip rar 7z mp4 mov mp3 wav xlsx pptx html css js py ipynb sh exe dll so log ini cfg
toml yaml lock bak tmp part crdownload url lnk db sqlite h5ad npy npz pt bin safetensors onnx blend obj stl md
rst tex
"""
ENDINGS = KINDS.split()
HIDDEN = ("._00.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/00.png", "__MACOSX/00.png")


def test_fifty_kinds_of_litter_end_in_a_report(tiny_clip: Path, tmp_path: Path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"thing {index}")
    (folder / "00.txt").write_text("x" * 200_000)
    (folder / "01.txt").write_text(json.loads('"half an emoji \\ud83d"'), encoding="utf-8", errors="surrogatepass")
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:300])
    for name in (*HIDDEN, *(f"litter.{ending}" for ending in ENDINGS), "second.heic", "noending"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x00\x01 no image")
    (folder / "loop").symlink_to(folder)

    result = embed(config(folder, tiny_clip, tmp_path / "store"))
    report = json.loads((tmp_path / "store/report.json").read_text())
    assert result.rows == len(EmbeddingStore.open(tmp_path / "store"))
    assert report["items"] == 8
    assert report["skipped"] == {"huge_caption": 1, "unreadable_caption": 1, "unreadable_image": 1}
    assert {problem["id"] for problem in report["problems"]} == {"00.png", "01.png", "02.png"}
    assert report["not_read"].keys() == {f".{ending}" for ending in ENDINGS} | {"no ending"}
    assert report["not_read"][".heic"] == {"count": 2, "first": ["litter.heic", "second.heic"]}
    said = capsys.readouterr().err
    assert all(fact in said for fact in ("2 .heic", "1 huge caption", "5 rows of 8 items"))
