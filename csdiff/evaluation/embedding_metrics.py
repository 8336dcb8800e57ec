"""Metrics of predicted image embeddings against the real ones.

Everything takes raw embeddings, rows are samples, and is computed in blocks, so that no N x N matrix is kept.
Directions are compared on the unit sphere; only :func:`norm_ratios` looks at lengths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BANDWIDTH = 0.5
"""Kernel width of the reported Cauchy-Schwarz divergence, on unit vectors."""

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
    g, t, p = (torch.cat(parts).double().cpu() for parts in (nearer, tied, right))
    result = {f"r@{k}": _hit_probability(g, t, p, k).mean().item() for k in ks}
    result["median_rank"] = (1 + g + t / (p + 1)).median().item()
    return result


def _hit_probability(g: Tensor, t: Tensor, p: Tensor, k: int) -> Tensor:
    """Probability that one of `p` items, shuffled among `t` others, stands in the first `k - g` places."""
    draws = (k - g).clamp(min=0)
    certain = draws > t
    draws = torch.where(certain, torch.zeros_like(draws), draws)
    log_miss = (
        torch.lgamma(t + 1) - torch.lgamma(t - draws + 1) + torch.lgamma(t + p - draws + 1) - torch.lgamma(t + p + 1)
    )
    return torch.where(certain, torch.ones_like(draws), 1 - log_miss.exp())


def centroid_gap(x: Tensor, y: Tensor) -> float:
    """Distance of the centroids of the unit vectors, `||mean(x/|x|) - mean(y/|y|)||`, in [0, 2]."""
    return (_unit(x).mean(0) - _unit(y).mean(0)).norm().item()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians fitted to the unit vectors, `|m1-m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    It is biased upwards on small samples: print real against real beside it.

    Args:
        x: `(N, D)`, N >= 2.
        y: `(M, D)`, M >= 2.
    """
    return centroid_gap(x, y) ** 2 + distribution_gap(x, y)


def distribution_gap(x: Tensor, y: Tensor) -> float:
    """The Frechet distance that is left after centring both sets: `Tr(S1 + S2 - 2 (S1 S2)^(1/2))` of unit vectors.

    `Tr (S1 S2)^(1/2)` is the nuclear norm of `A B^T` for `S1 = A^T A`, `S2 = B^T B`: stable where the covariances are
    singular, as they are with fewer samples than dimensions.
    """
    a, b = (_covariance_factor(_unit(z)) for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(((a**2).sum() + (b**2).sum() - 2 * cross).item(), 0.0)


def _covariance_factor(z: Tensor) -> Tensor:
    """`(min(N, D), D)` matrix A with `A^T A` the covariance of the rows."""
    if len(z) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, found {len(z)}")
    centred = (z - z.mean(0)) / (len(z) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(z) > z.shape[1] else centred


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of unit vectors under the polynomial kernel `(x.y + 1)^3`, times 1000 (Binkowski et al. 2018).

    Zero in expectation for two samples of one distribution, whatever their size; slightly negative values are noise.

    Args:
        x: `(N, D)`, N >= 2.
        y: `(M, D)`, M >= 2.
    """
    x, y = _unit(x), _unit(y)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"kernel_distance needs at least 2 rows in each set, found {n} and {m}")
    within_x = (_kernel_sum(x, x) - ((x * x).sum(1) + 1).pow(3).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - ((y * y).sum(1) + 1).pow(3).sum()) / (m * (m - 1))
    return 1000 * (within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)).item()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return sum((rows @ y.T + 1).pow(3).sum() for rows in x.split(_BLOCK))


def cosine_similarities(
    prediction: Tensor, image: Tensor, text: Tensor | None, image_ids: Tensor
) -> dict[str, float | None]:
    """Mean cosine of a prediction to its true image, to its own caption, and to unrelated captions.

    `paired` is high when the prediction lands near its picture; `text` and `unpaired` compare with raw text embeddings
    (own caption; mean over all captions of other pictures) and are None where text has another dimension.

    Args:
        prediction: `(N, D)`.
        image: `(N, D)`.
        text: `(N, Dt)` or None.
        image_ids: `(N,)` picture of each row.
    """
    p = _unit(prediction)
    result = {"paired": (p * _unit(image)).sum(1).mean().item(), "unpaired": None, "text": None}
    if text is None or text.shape[1] != prediction.shape[1]:
        return result
    t = _unit(text)
    result["text"] = (p * t).sum(1).mean().item()
    _, group, sizes = image_ids.to(p.device).unique(return_inverse=True, return_counts=True)
    sums = [
        torch.zeros(len(sizes), z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, group, z) for z in (p, t)
    ]
    pairs = len(p) ** 2 - (sizes.double() ** 2).sum().item()
    if pairs:
        result["unpaired"] = ((p.sum(0) @ t.sum(0) - (sums[0] * sums[1]).sum()) / pairs).item()
    return result


def norm_ratios(prediction: Tensor, image: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the predicted norms over those of the real ones; 1 and 1 are right."""
    p, r = prediction.double().norm(dim=1), image.double().norm(dim=1)
    spread = r.std().item()
    # Unit-norm sets have no spread: two of them agree, anything else is infinitely wide beside them.
    if spread < 1e-6 * r.mean().item():
        ratio = 1.0 if p.std().item() < 1e-4 * p.mean().item() else float("inf")
    else:
        ratio = p.std().item() / spread
    return {"mean_ratio": (p.mean() / r.mean()).item(), "std_ratio": ratio}


def effective_rank(x: Tensor) -> float:
    """`exp(H(s / sum s))` of the singular values `s` of the centred unit vectors (Roy and Vetterli 2007).

    Between 1 (collapsed onto a line) and `min(N - 1, D)`; compare with the value of the real embeddings.
    """
    s = torch.linalg.svdvals(_covariance_factor(_unit(x)))
    if s.sum() <= 1e-12:
        return 1.0
    share = s / s.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()


def embedding_metrics(
    prediction: Tensor,
    image: Tensor,
    text: Tensor | None = None,
    image_ids: Tensor | None = None,
    bandwidth: float = BANDWIDTH,
) -> dict:
    """Everything above for one set of predictions.

    Args:
        prediction: `(N, D)` adapted text embeddings, one row a caption.
        image: `(N, D)` real image embeddings of the same rows; pictures with several captions repeat.
        text: `(N, Dt)` raw text embeddings, for the cosines to the captions.
        image_ids: `(N,)` picture of each row; by default rows with equal image embeddings are one picture.
        bandwidth: Kernel width of the Cauchy-Schwarz divergence, on unit vectors.

    Returns:
        Nested dict with keys `text_to_image` and `image_to_text` (`r@1`, `r@5`, `r@10`, `median_rank`),
        `centroid_gap`, `distribution_gap`, `frechet_distance`, `kernel_distance`, `cs_divergence`, `cosine`, `norm`,
        `effective_rank`, `count`. Distribution metrics compare all predictions with the distinct pictures.

    Raises:
        ValueError: if the rows do not match or there are fewer than 2 pictures.
    """
    from csdiff.losses import cauchy_schwarz_divergence

    if prediction.shape != image.shape:
        raise ValueError(
            f"predictions and images must have one shape, found {tuple(prediction.shape)} and {tuple(image.shape)}"
        )
    ids = (image_identities(image) if image_ids is None else image_ids).to(prediction.device)
    first = _first_rows(ids)
    if len(first) < 2:
        raise ValueError(f"metrics need at least 2 different pictures, found {len(first)}")
    pictures, picture_ids = image[first], ids[first]
    return {
        "count": len(prediction),
        "text_to_image": retrieval(prediction, pictures, ids, picture_ids),
        "image_to_text": retrieval(pictures, prediction, picture_ids, ids),
        "centroid_gap": centroid_gap(prediction, pictures),
        "distribution_gap": distribution_gap(prediction, pictures),
        "frechet_distance": frechet_distance(prediction, pictures),
        "kernel_distance": kernel_distance(prediction, pictures),
        "cs_divergence": cauchy_schwarz_divergence(
            _unit(prediction).float(), _unit(pictures).float(), bandwidth=bandwidth
        ).item(),
        "cosine": cosine_similarities(prediction, image, text, ids),
        "norm": norm_ratios(prediction, pictures),
        "effective_rank": effective_rank(prediction),
    }


def baseline_metrics(
    train_text: Tensor, train_image: Tensor, text: Tensor, image: Tensor, image_ids: Tensor | None = None
) -> dict:
    """The data's own baselines: raw text, mean shift and ridge, with the metrics of :func:`embedding_metrics`.

    Ridge is the closed form `(T^T T + a I)^-1 T^T Y` of centred data with `a = 0.01 Tr(T^T T) / Dt`.

    Args:
        train_text: `(N, Dt)` text embeddings to fit on.
        train_image: `(N, D)` their images.
        text: `(M, Dt)` held-out text embeddings.
        image: `(M, D)` their images.
        image_ids: `(M,)` picture of each held-out row.

    Returns:
        `{"raw_text": ..., "mean_shift": ..., "ridge": ...}`; the first two are absent where dimensions differ.
    """
    text_mean, image_mean = train_text.double().mean(0), train_image.double().mean(0)
    t, y = train_text.double() - text_mean, train_image.double() - image_mean
    gram = t.T @ t
    gram.diagonal().add_(0.01 * gram.diagonal().mean().clamp(min=1e-12))
    weight = torch.linalg.solve(gram, t.T @ y)
    predictions = {"ridge": (text.double() - text_mean) @ weight + image_mean}
    if text.shape[1] == image.shape[1]:
        predictions = {"raw_text": text, "mean_shift": text.double() - text_mean + image_mean, **predictions}
    return {name: embedding_metrics(p.float(), image, text, image_ids) for name, p in predictions.items()}


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.detach().double(), dim=-1)


def _first_rows(ids: Tensor) -> Tensor:
    """Row of the first appearance of every id, ascending."""
    values, inverse = ids.unique(return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    first = torch.full((len(values),), len(ids), dtype=torch.long, device=ids.device)
    return first.scatter_reduce_(0, inverse, rows, reduce="amin").sort().values
