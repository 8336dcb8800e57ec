"""The terms that objectives are made of: functions of an objective, whose options they read, and a batch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csdiff.losses.arguments import check_finite, check_number, check_sets
from csdiff.losses.autograd import apart_from_autocast
from csdiff.losses.cauchy_schwarz import cauchy_schwarz_divergence, log_mean_kernel, squared_mmd
from csdiff.losses.contrastive import info_nce
from csdiff.losses.process_group import global_rows, global_sum
from csdiff.losses.tiles import compute_dtype, unit_rows
from csdiff.losses.tokens import token_cauchy_schwarz_divergence


@dataclass(kw_only=True)
class Batch:
    """The inputs of an objective, as `Objective.forward` takes them."""

    prediction: Tensor
    image: Tensor
    source_text: Tensor | None = None
    unpaired_text: Tensor | None = None
    unpaired_image: Tensor | None = None
    text_tokens: Tensor | None = None
    image_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    image_mask: Tensor | None = None
    group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self):
        self.check_pairs("image")

    def check_pairs(self, name: str) -> None:
        """Raise ValueError unless the rows of that name have the shape of the predictions."""
        rows = getattr(self, name)
        check_sets(prediction=self.prediction)
        check_sets(**{name: rows})
        if self.prediction.shape != rows.shape:
            shapes = f"{tuple(self.prediction.shape)} and {tuple(rows.shape)}"
            raise ValueError(f"prediction and {name} must be pairs of one shape; found {shapes}")

    def pooled(self) -> list[Tensor]:
        """All predictions and all images, those without a partner too."""
        sides = [self.prediction, self.image]
        for side, name in enumerate(("unpaired_text", "unpaired_image")):
            unpaired = getattr(self, name)
            if unpaired is not None:
                check_sets(**{name: unpaired, "image": self.image})
                sides[side] = torch.cat([sides[side], unpaired])
        return sides


def contrast(o: Any, batch: Batch) -> Tensor:
    """InfoNCE of the pairs on unit vectors, CLIP's loss."""
    options = {"temperature": o.current_temperature(), "two_sided": o.two_sided, "block_size": o.block_size}
    return info_nce(batch.prediction, batch.image, normalize=True, group=batch.group, **options)


def contrast_with_source(o: Any, batch: Batch) -> Tensor:
    """One-way InfoNCE: the prediction picks its caption's un-adapted embedding out of the batch, and so stays near it.

    Source: Patel et al., "ECLIPSE: a resource-efficient text-to-image prior for image generations", CVPR 2024.
    """
    source = batch.source_text
    if source is None:
        raise ValueError("the contrast against the captions needs source_text, their own embeddings; found None")
    batch.check_pairs("source_text")
    options = {"temperature": o.current_temperature(), "two_sided": False, "block_size": o.block_size}
    return info_nce(batch.prediction, source, normalize=True, group=batch.group, **options)


def divergence(o: Any, batch: Batch) -> Tensor:
    """The Cauchy-Schwarz divergence of all predictions and all images on the unit sphere."""
    options = {"bandwidth": o.bandwidth, "diagonal": o.diagonal, "block_size": o.block_size}
    return cauchy_schwarz_divergence(*batch.pooled(), normalize=True, group=batch.group, **options)


def discrepancy(o: Any, batch: Batch) -> Tensor:
    """The squared maximum mean discrepancy of the same sets; `diagonal=False` gives the unbiased estimate."""
    options = {"bandwidth": o.bandwidth, "diagonal": o.diagonal, "block_size": o.block_size}
    return squared_mmd(*batch.pooled(), normalize=True, group=batch.group, **options)


def token_divergence(o: Any, batch: Batch) -> Tensor | None:
    """The mean divergence between the pairs' tokens on the unit sphere, None without tokens."""
    tokens = (batch.text_tokens, batch.image_tokens)
    missing = [name for name in ("text_tokens", "image_tokens") if getattr(batch, name) is None]
    if len(missing) == 2:
        return None
    if missing:
        raise ValueError(f"text_tokens and image_tokens must be given together; found no {missing[0]}")
    return token_cauchy_schwarz_divergence(
        *tokens,
        batch.text_mask,
        batch.image_mask,
        bandwidth=o.bandwidth if o.token_bandwidth is None else o.token_bandwidth,
        diagonal=o.diagonal if o.token_diagonal is None else o.token_diagonal,
        normalize=True,
        group=batch.group,
    )


def regression(o: Any, batch: Batch) -> Tensor:
    """Mean squared error over all entries of the pairs.

    `rows` (`regression_rows` of `CSAlignerLoss`): "raw" as they are; "unit" after division by their lengths, summed
    over D in place of averaged, so that it is `2 - 2 cos`; "standardized" divided by the mean coordinate variance of
    the images, so that predicting their mean costs 1 whatever the encoder's scale. Alone on "raw" rows it is ECLIPSE's
    "Projection" baseline.
    """
    rows = o.rows or o.regression_rows
    if rows == "unit":
        return _mean(_square_distances(batch), batch)
    dtype = compute_dtype(batch.prediction.dtype, batch.image.dtype)
    prediction, image = batch.prediction.to(dtype), batch.image.to(dtype)
    error = _mean((prediction - image).square().mean(dim=1), batch)
    if rows == "raw":
        return error
    real = image.detach()
    return error / _mean((real - _mean(real, batch)).square().mean(dim=1), batch)


def alignment(o: Any, batch: Batch) -> Tensor:
    """`mean_i ||x_i - y_i||^alpha` of unit vectors.

    Source: Wang, Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", 2020.
    """
    square = _square_distances(batch)
    # The floor keeps the root's derivative finite where a pair coincides.
    return _mean(square if o.alpha == 2 else square.clamp_min(1e-12).pow(o.alpha / 2), batch)


def uniformity(o: Any, batch: Batch) -> Tensor:
    """`U(x) = log mean_{i != j} exp(-t ||x_i - x_j||^2)` of unit vectors, the mean of both sides; source as above."""
    return sum(_spread(rows, o.t, batch) for rows in (batch.prediction, batch.image)) / 2


def centroid_uniformity(o: Any, batch: Batch) -> Tensor:
    """`U(c)` of the pairs' centroids `c_i = (x_i + y_i) / ||x_i + y_i||`.

    Source: Grassucci et al., "Closing the modality gap aligns group-wise semantics", arXiv 2601.18525, ICLR 2026.
    """
    return _spread(unit_rows(batch.prediction) + unit_rows(batch.image), o.t, batch)


def coral(o: Any, batch: Batch) -> Tensor:
    """Deep CORAL: `||cov(x) - cov(y)||_F^2 / (4 D^2) + mean_weight ||mean(x) - mean(y)||^2` of all unit vectors.

    As published it compares covariances alone (`mean_weight=0`) and so leaves the distance of the centroids as it is.
    Source: Sun, Saenko, "Deep CORAL", 2016.
    """

    def gap(x: Tensor, y: Tensor) -> Tensor:
        if min(len(x), len(y)) < 2:
            raise ValueError(f"coral needs at least two rows on each side; found {len(x)} and {len(y)}")
        covariances = (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * x.shape[1] ** 2)
        return covariances + o.mean_weight * (x.mean(dim=0) - y.mean(dim=0)).square().sum()

    return apart_from_autocast(gap, *unit_rows_of_all(batch))


def kernel_kl(o: Any, batch: Batch) -> Tensor:
    """`mean_i [log q(y_i) - log p(y_i)]` of kernel density estimates q of y, its own point left out, and p of x.

    `reverse=True` takes the divergence of the predictions from the images instead. All pairs at once: memory grows
    with the square of the sets.
    """

    def mean_log_ratio(x: Tensor, y: Tensor) -> Tensor:
        at, other = (x, y) if o.reverse else (y, x)
        if len(at) < 2:
            raise ValueError(f"kl needs at least two rows on the side it averages over; found {len(at)}")
        # Of unit vectors: ||a - b||^2 = 2 - 2 a.b
        own, cross = ((at @ rows.T - 1) / o.bandwidth**2 for rows in (at, other))
        own = own.fill_diagonal_(-math.inf).logsumexp(dim=1) - math.log(len(at) - 1)
        return (own - (cross.logsumexp(dim=1) - math.log(len(other)))).mean()

    return apart_from_autocast(mean_log_ratio, *unit_rows_of_all(batch))


def sinkhorn(o: Any, batch: Batch) -> Tensor:
    """Debiased Sinkhorn divergence of all unit vectors with squared Euclidean cost, by the package geomloss.

    `blur` is the width at which the transport is smoothed, in the units of unit vectors; `scaling` anneals from coarse
    to fine: nearer to 1 is slower and more exact.
    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019.
    """
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=o.blur, scaling=o.scaling, backend="tensorized")
    return apart_from_autocast(loss, *unit_rows_of_all(batch))


def check_width(o: Any) -> None:
    """Raise ValueError unless the bandwidth is one number."""
    check_number("bandwidth", o.bandwidth)


def check_geomloss(o: Any) -> None:
    """Raise ImportError unless geomloss is installed."""
    try:
        import geomloss  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the objective sinkhorn needs the package geomloss, found none: pip install 'csdiff[losses]'"
        ) from error


def unit_rows_of_all(batch: Batch) -> list[Tensor]:
    """Unit predictions and images of all processes, those without a partner too, differentiable."""
    found = []
    for name, rows in zip(("prediction", "image"), batch.pooled(), strict=True):
        rows = global_rows(name, rows, batch.group)
        check_finite(name, rows.detach())
        found.append(unit_rows(rows))
    return found


def _square_distances(batch: Batch) -> Tensor:
    dtype = compute_dtype(batch.prediction.dtype, batch.image.dtype)
    return (unit_rows(batch.prediction, dtype) - unit_rows(batch.image, dtype)).square().sum(dim=1)


def _spread(rows: Tensor, t: float, batch: Batch) -> Tensor:
    return log_mean_kernel(rows, bandwidth=1 / math.sqrt(2 * t), diagonal=False, normalize=True, group=batch.group)


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean over the pairs of all processes."""
    count = global_sum(torch.full((), float(len(values)), dtype=values.dtype, device=values.device), batch.group)
    return global_sum(values.sum(dim=0), batch.group) / count.detach()
