"""How alike two batches of pictures look to the tiny CLIP: the perceptual loss of the decoder's training scripts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from train_clip import IMAGE_SIZE
from transformers import CLIPVisionModelWithProjection

LAYERS = (1, 3, 5)


class PerceptualLoss(nn.Module):
    """Mean of 1 - cos between the tokens of three layers, plus 1 - cos between the centred image embeddings.

    The tokens say where something looks wrong, the embedding whether the whole still means the same. Embeddings share
    a large mean (their plain cosine is near one for any two pictures), which `centre`, shape (D,), takes away.
    """

    def __init__(self, clip: Path, centre: torch.Tensor) -> None:
        super().__init__()
        self.encoder = CLIPVisionModelWithProjection.from_pretrained(clip).eval().requires_grad_(False)
        self.register_buffer("centre", centre)

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Of pictures (B, 3, H, W) in [-1, 1]: tokens (B, T, W) of the layers and the centred embedding (B, D)."""
        views = F.interpolate(pixels, size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(-1, 1)
        output = self.encoder(views, output_hidden_states=True)
        return [*(output.hidden_states[layer] for layer in LAYERS), output.image_embeds - self.centre]

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(output), wanted, strict=True)
        distances = [1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
        return torch.stack(distances[:-1]).mean() + distances[-1]
