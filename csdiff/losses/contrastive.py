"""InfoNCE."""

import torch
import torch.nn.functional as F


def info_nce(x, y, *, temperature=0.07, two_sided=True, normalize=False, block_size=None, group=None):
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits = x @ y.T / temperature
    target = torch.arange(len(x), device=x.device)
    loss = F.cross_entropy(logits, target)
    return (loss + F.cross_entropy(logits.T, target)) / 2 if two_sided else loss
