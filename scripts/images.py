"""Captioned images of the parquet files as tensors, for the scripts that train and measure the shipped models."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
BUILD = ROOT / "build/assets"
SPLITS = ("train", "combination", "concept")


@dataclass
class Images:
    """N images in memory: `pixels` (N, 3, 128, 128) uint8 on a device, and one entry an image in the lists."""

    pixels: torch.Tensor
    captions: list[list[str]]
    concepts: list[str]
    labels: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.pixels)


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def load_images(*paths: Path, every: int = 1, device: torch.device | str = "cpu") -> Images:
    """All images of the parquet files, or each `every`-th of them."""
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()][::every]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    return Images(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
        captions=[row["captions"] for row in rows],
        concepts=[row["concept"] for row in rows],
        labels=[row["label"] for row in rows],
        styles=[row["style"] for row in rows],
    )


def load_split(split: str, every: int = 1, device: torch.device | str = "cpu") -> Images:
    return load_images(ASSETS / f"data/{split}.parquet", every=every, device=device)


def load_training(further: Path, every: int = 1, device: torch.device | str = "cpu") -> Images:
    """What the shipped models are trained on: the train split and, where it was built, the further sets."""
    paths = [ASSETS / "data/train.parquet"]
    if further.is_file():
        paths.append(further)
    else:
        print(f"{further} is not there: training on the shipped images alone (scripts/build_dataset.py makes it)")
    return load_images(*paths, every=every, device=device)


def sharp_view(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 images (B, 3, H, W) at `size` in [-1, 1], as the image processor of the tiny CLIP makes them."""
    return F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255) / 127.5 - 1


def moved_view(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Random scale, shift and small rotation on a white canvas, at `size` in [-1, 1].

    Never mirrored: letters, flags, arrows and clocks mean something else the other way round.
    """
    batch, device = len(pixels), pixels.device
    scale = 0.85 + 0.5 * torch.rand(batch, device=device)
    angle = 0.4 * (torch.rand(batch, device=device) - 0.5)
    shift = 0.25 * (torch.rand(batch, 2, device=device) - 0.5)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, (batch, 3, size, size), align_corners=False)
    # White is 0 after this inversion, so grid_sample's zero padding paints white.
    inverted = 1 - pixels.float() / 255
    return 1 - 2 * F.grid_sample(inverted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
