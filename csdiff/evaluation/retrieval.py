"""Retrieval by cosine similarity, with ties and with several captions an image."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RECALLS = (1, 5, 10)
_BLOCK = 2048


def image_identities(image: Tensor) -> Tensor:
    """Number `(N,)` of the picture of each row of `(N, D)` image embeddings: its captions carry the same embedding."""
    seen: dict[bytes, int] = {}
    rows = image.detach().cpu().contiguous().numpy()
    return torch.tensor([seen.setdefault(row.tobytes(), len(seen)) for row in rows], dtype=torch.long)


def first_rows(ids: Tensor) -> Tensor:
    """Row of the first appearance of every id, ascending."""
    first = np.unique(ids.cpu().numpy(), return_index=True)[1]
    return torch.from_numpy(np.sort(first)).to(ids.device)


@dataclass(frozen=True)
class Ranks:
    """Where the best right item of each query stands; ties are broken at random and expected values reported.

    Attributes:
        nearer: `(Q,)` wrong items strictly nearer than the best right one.
        tied: `(Q,)` wrong items as near as it.
        right: `(Q,)` right items as near as it, itself among them.
    """

    nearer: Tensor
    tied: Tensor
    right: Tensor

    def hits(self, k: int) -> Tensor:
        """`(Q,)` probability that a right item is among the first k, `1 - C(t, k-g) / C(t+p, k-g)`.

        With g wrong items nearer, and t wrong and p right ones tied at the best right similarity: a collapsed model
        scores what guessing scores.
        """
        t, p = self.tied, self.right
        draws = (k - self.nearer).clamp(min=0)
        certain = draws > t
        draws = draws.masked_fill(certain, 0)
        log_miss = (
            torch.lgamma(t + 1)
            - torch.lgamma(t - draws + 1)
            + torch.lgamma(t + p - draws + 1)
            - torch.lgamma(t + p + 1)
        )
        return (1 - log_miss.exp()).masked_fill(certain, 1)

    def expected(self) -> Tensor:
        """`(Q,)` expected rank of the first right item, from 1."""
        return 1 + self.nearer + self.tied / (self.right + 1)

    def summary(self) -> dict[str, float]:
        """`r@1`, `r@5` and `r@10`, in [0, 1], and `median_rank`, from 1."""
        recalls = {f"r@{k}": self.hits(k).mean().item() for k in RECALLS}
        return {**recalls, "median_rank": self.expected().quantile(0.5).item()}


def retrieval_ranks(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Ranks:
    """Ranks of the right items of `(Q, D)` queries in a `(G, D)` gallery, by cosine similarity, in blocks.

    A gallery item is right when its id is the query's; several right items a query are allowed.

    Raises:
        ValueError: if a query has no right item in the gallery.
    """
    query, gallery = F.normalize(query.float(), dim=-1), F.normalize(gallery.float(), dim=-1)
    query_ids, gallery_ids = query_ids.to(query.device), gallery_ids.to(query.device)
    nearer, tied, right = [], [], []
    for rows, ids in zip(query.split(_BLOCK), query_ids.split(_BLOCK), strict=True):
        similarity = rows @ gallery.T
        positive = ids[:, None] == gallery_ids[None, :]
        if not positive.any(dim=1).all():
            raise ValueError("retrieval: a query has no right item in the gallery")
        best = similarity.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        # Equal vectors give similarities that differ in the last bits, depending on their place in the product.
        tie = (similarity - best).abs() <= 1e-6
        nearer.append(((similarity > best) & ~tie & ~positive).sum(1))
        tied.append((tie & ~positive).sum(1))
        right.append((tie & positive).sum(1))
    return Ranks(*(torch.cat(parts).double().cpu() for parts in (nearer, tied, right)))
