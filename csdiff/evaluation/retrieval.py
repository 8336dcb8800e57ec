"""Retrieval by cosine similarity, with ties and with several captions an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2048


def image_identities(image: Tensor) -> Tensor:
    """Number the distinct rows: captions of one picture carry the same image embedding, hence the same number.

    Args:
        image: `(N, D)` image embeddings, one row a caption.

    Returns:
        `(N,)` int64 identities in order of first appearance.
    """
    seen: dict[bytes, int] = {}
    rows = image.detach().cpu().contiguous().numpy()
    return torch.tensor([seen.setdefault(row.tobytes(), len(seen)) for row in rows], dtype=torch.long)


def first_rows(ids: Tensor) -> Tensor:
    """Row of the first appearance of every id, ascending."""
    values, inverse = ids.unique(return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    first = torch.full((len(values),), len(ids), dtype=torch.long, device=ids.device)
    return first.scatter_reduce_(0, inverse, rows, reduce="amin").sort().values


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
        """`(Q,)` probability that a right item is among the first k: `1 - C(t, k-g) / C(t+p, k-g)`."""
        t, p = self.tied, self.right
        draws = (k - self.nearer).clamp(min=0)
        certain = draws > t
        draws = torch.where(certain, torch.zeros_like(draws), draws)
        log_miss = (
            torch.lgamma(t + 1)
            - torch.lgamma(t - draws + 1)
            + torch.lgamma(t + p - draws + 1)
            - torch.lgamma(t + p + 1)
        )
        return torch.where(certain, torch.ones_like(draws), 1 - log_miss.exp())

    def expected(self) -> Tensor:
        """`(Q,)` expected rank of the first right item, from 1."""
        return 1 + self.nearer + self.tied / (self.right + 1)

    def summary(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """`r@k` for every k, and `median_rank`."""
        recalls = {f"r@{k}": self.hits(k).mean().item() for k in ks}
        return {**recalls, "median_rank": self.expected().quantile(0.5).item()}

    def curve(self, ks: Sequence[int]) -> list[float]:
        """Recall at every k."""
        return [self.hits(k).mean().item() for k in ks]


def retrieval_ranks(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Ranks:
    """Ranks of the right items by cosine similarity, in blocks.

    Args:
        query: `(Q, D)`.
        gallery: `(G, D)`.
        query_ids: `(Q,)` integers; a gallery item is right when its id is the query's.
        gallery_ids: `(G,)` integers; several right items a query are allowed.

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


def retrieval(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k and median rank of the first right gallery item, by cosine similarity.

    Ties are broken at random and the *expected* value is reported: with `g` wrong items strictly nearer, `t` wrong and
    `p` right items tied at the best right similarity, the first right one is among the top k with probability
    `1 - C(t, k-g) / C(t+p, k-g)`. A collapsed model therefore scores what guessing scores.

    Args:
        query: `(Q, D)`.
        gallery: `(G, D)`.
        query_ids: `(Q,)` integers; a gallery item is right when its id is the query's.
        gallery_ids: `(G,)` integers; several right items a query are allowed.
        ks: Cut-offs.

    Returns:
        `{"r@1": ..., "r@5": ..., "r@10": ..., "median_rank": ...}`, recalls in [0, 1], ranks from 1.

    Raises:
        ValueError: if a query has no right item in the gallery.
    """
    return retrieval_ranks(query, gallery, query_ids, gallery_ids).summary(ks)
