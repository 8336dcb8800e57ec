"""EfficientNet-Lite0, trained on ImageNet, teaches the shipped models and judges them.

As a teacher it gives targets for the image tower and a perceptual loss; none of its weights goes into what is trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from images import to_pil
from loop import DEVICE
from torch import Tensor, nn

from csdiff.evaluation import load_extractor

COMPONENTS = 192
DEPTHS = (2, 4, 8)
"""Blocks whose feature maps the perceptual loss compares."""


def pooled_features(pixels: Tensor) -> Tensor:
    """(N, 1280) of uint8 images (N, 3, H, W)."""
    extractor = load_extractor("efficientnet-lite0", DEVICE)
    return torch.cat([extractor(to_pil(chunk)) for chunk in pixels.split(64)])


def image_targets(pixels: Tensor) -> Tensor:
    """Standardized pooled features in their first principal components, unit rows (N, 192)."""
    features = pooled_features(pixels).to(DEVICE)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-3)
    _, _, directions = torch.pca_lowrank(standard, q=min(COMPONENTS, len(pixels) - 1))
    return F.normalize(standard @ directions, dim=1)


class PerceptualLoss(nn.Module):
    """Mean squared distance of feature maps, unit vectors at every place, over three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = load_extractor("efficientnet-lite0", DEVICE).model

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
