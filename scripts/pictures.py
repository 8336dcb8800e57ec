"""The shipped pictures and captions as tensors, shared by the scripts that train the shipped models."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "assets/data"
SPLITS = ("train", "combination", "concept")


@dataclass
class Pictures:
    """One split in memory: `pixels` (N, 3, 128, 128) uint8 and one entry a picture in the lists."""

    pixels: torch.Tensor
    captions: list[list[str]]
    concepts: list[str]
    labels: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: list[int]) -> list[Image.Image]:
        return [Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy()) for i in indices]


def load_pictures(split: str, data: Path = DATA) -> Pictures:
    table = pq.read_table(data / f"{split}.parquet")
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["image"].to_pylist()]
    )
    return Pictures(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=table["captions"].to_pylist(),
        concepts=table["concept"].to_pylist(),
        labels=table["label"].to_pylist(),
        styles=table["style"].to_pylist(),
    )
