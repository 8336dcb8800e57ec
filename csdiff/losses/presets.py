"""The other objectives: each names its options and the terms that it adds up."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from csdiff.losses import terms
from csdiff.losses.arguments import check_positive
from csdiff.losses.autograd import apart_from_autocast
from csdiff.losses.objective import Batch, Objective, Term

objective = dataclass(kw_only=True, eq=False, repr=False)


@objective
class InfoNCELoss(Objective):
    """InfoNCE of the pairs on unit vectors, CLIP's loss; see `info_nce`.

    Args:
        temperature: of the softmax.
        learnable_temperature: make it a parameter, held as its logarithm and never below 0.01, CLIP's bound.
        two_sided: False leaves the direction "text picks its image" alone.
        block_size: see `info_nce`.
    """

    temperature: float = 0.07
    learnable_temperature: bool = False
    two_sided: bool = True
    block_size: int | None = None

    def terms(self) -> list[Term]:
        options = {"two_sided": self.two_sided, "block_size": self.block_size}
        return [Term("info_nce", 1.0, partial(terms.contrast, temperature=self.current_temperature(), **options))]


@objective
class ProjectionLoss(Objective):
    """Mean squared error alone: ECLIPSE's "Projection" baseline. `rows`: see `csdiff.losses.terms.regression`.

    Source: Patel et al., "ECLIPSE", arXiv 2312.04655.
    """

    rows: str = "raw"

    def terms(self) -> list[Term]:
        return [Term("mse", 1.0, partial(terms.regression, rows=self.rows))]


@objective
class EclipseLoss(Objective):
    """ECLIPSE: `MSE(prediction, image) + contrast_weight * InfoNCE(prediction against source_text)`.

    The contrast is one-way and against the *text* embeddings: the prediction picks its caption out of the batch, which
    keeps it near the language it came from. It needs text and image embeddings of one dimension.

    Args:
        contrast_weight: 0.2 as published; 0 gives `ProjectionLoss`.
        temperature: of the contrast.
        rows: of the mean squared error, see `csdiff.losses.terms.regression`.
        block_size: see `info_nce`.

    Raises:
        ValueError: no `source_text`, or one of another shape than the prediction.

    Source: Patel et al., "ECLIPSE: a resource-efficient text-to-image prior for image generations", CVPR 2024.
    """

    contrast_weight: float = 0.2
    temperature: float = 0.07
    rows: str = "raw"
    block_size: int | None = None

    def terms(self) -> list[Term]:
        contrast = partial(terms.contrast_with_source, temperature=self.temperature, block_size=self.block_size)
        return [
            Term("mse", 1.0, partial(terms.regression, rows=self.rows)),
            Term("contrast", self.contrast_weight, contrast, reads="source_text"),
        ]


@objective
class DistributionLoss(Objective):
    """Base: `weight * divergence(all text, all images) + info_nce_weight * InfoNCE(pairs)` on unit vectors.

    Unpaired embeddings enter the divergence alone. A class names its divergence in `term` and computes it in
    `divergence`.

    Args:
        weight: of the divergence, >= 0.
        info_nce_weight: of InfoNCE, >= 0; left out by default.
        temperature: of InfoNCE.
        two_sided: of InfoNCE.
    """

    weight: float = 1.0
    info_nce_weight: float = 0.0
    temperature: float = 0.07
    two_sided: bool = True

    uses_unpaired: ClassVar[bool] = True
    term: ClassVar[str]

    def divergence(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def terms(self) -> list[Term]:
        contrast = partial(terms.contrast, temperature=self.temperature, two_sided=self.two_sided)
        return [
            Term(self.term, self.weight, self.divergence, reads="unpaired"),
            Term("info_nce", self.info_nce_weight, contrast),
        ]


@objective
class CauchySchwarzLoss(DistributionLoss):
    """The Cauchy-Schwarz divergence alone; options as for `cauchy_schwarz_divergence`."""

    bandwidth: float | Sequence[float] | str = 0.5
    diagonal: bool = True
    block_size: int | None = None

    term: ClassVar[str] = "cs"

    def divergence(self, batch: Batch) -> Tensor:
        return terms.divergence(batch, self.bandwidth, self.diagonal, self.block_size)


@objective
class MMDLoss(CauchySchwarzLoss):
    """Squared maximum mean discrepancy, see `squared_mmd`; `diagonal=False` gives the unbiased estimate."""

    term: ClassVar[str] = "mmd"

    def divergence(self, batch: Batch) -> Tensor:
        return terms.discrepancy(batch, self.bandwidth, self.diagonal, self.block_size)


@objective
class SinkhornLoss(DistributionLoss):
    """Debiased Sinkhorn divergence with squared Euclidean cost, by the package geomloss (extra `csdiff[losses]`).

    Args:
        blur: the width at which the transport is smoothed, in the units of unit vectors.
        scaling: annealing from coarse to fine; nearer to 1 is slower and more exact.

    Raises:
        ImportError: geomloss is not installed.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019.
    """

    blur: float = 0.1
    scaling: float = 0.5

    term: ClassVar[str] = "sinkhorn"

    def __post_init__(self):
        super().__post_init__()
        try:
            from geomloss import SamplesLoss
        except ImportError as error:
            raise ImportError(
                "the objective sinkhorn needs the package geomloss, found none: pip install 'csdiff[losses]'"
            ) from error
        self.sinkhorn = SamplesLoss("sinkhorn", p=2, blur=self.blur, scaling=self.scaling, backend="tensorized")

    def divergence(self, batch: Batch) -> Tensor:
        return apart_from_autocast(self.sinkhorn, *terms.unit_rows_of_all(batch))


@objective
class CoralLoss(DistributionLoss):
    """Deep CORAL: `||cov(x) - cov(y)||_F^2 / (4 D^2)`, plus `mean_weight ||mean(x) - mean(y)||^2`.

    As published it compares covariances alone (`mean_weight=0`) and so leaves the distance of the centroids as it is.
    Source: Sun, Saenko, "Deep CORAL", 2016.
    """

    mean_weight: float = 0.0

    term: ClassVar[str] = "coral"

    def divergence(self, batch: Batch) -> Tensor:
        return terms.coral(batch, self.mean_weight)


@objective
class KernelKLLoss(DistributionLoss):
    """Kullback-Leibler divergence of kernel density estimates: `mean_i [log q(y_i) - log p(y_i)]`, y the images.

    `log q(y_i) = log mean_{j != i} k(y_i, y_j)`, `log p(y_i) = log mean_j k(y_i, x_j)`. `reverse=True` takes the
    divergence of the predictions from the images instead. All pairs at once: memory grows with the square of the sets.
    """

    bandwidth: float = 0.5
    reverse: bool = False

    term: ClassVar[str] = "kl"

    def __post_init__(self):
        self.bandwidth = check_positive("bandwidth", self.bandwidth)
        super().__post_init__()

    def divergence(self, batch: Batch) -> Tensor:
        return terms.kernel_kl(batch, self.bandwidth, self.reverse)


@objective
class UniformAlignLoss(Objective):
    """Alignment and uniformity: `mean_i ||x_i - y_i||^alpha + uniformity_weight (U(x) + U(y)) / 2` on unit vectors.

    `U(x) = log mean_{i != j} exp(-t ||x_i - x_j||^2)`, which needs two pairs at least. Source: Wang, Isola,
    "Understanding contrastive representation learning through alignment and uniformity on the hypersphere", 2020.
    """

    alpha: float = 2.0
    t: float = 2.0
    uniformity_weight: float = 1.0

    def terms(self) -> list[Term]:
        return [
            Term("align", 1.0, partial(terms.alignment, alpha=self.alpha)),
            Term("uniform", self.uniformity_weight, self._uniformity),
        ]

    def _uniformity(self, batch: Batch) -> Tensor:
        return sum(terms.uniformity(rows, self.t, batch) for rows in (batch.prediction, batch.image)) / 2


@objective
class ModGapLoss(Objective):
    """ModGap: `InfoNCE + align_weight mean_i ||x_i - y_i||^2 + uniformity_weight U(c)` on unit vectors.

    `c_i = (x_i + y_i) / ||x_i + y_i||` are the pairs' centroids and `U(c) = log mean_{i != j} exp(-t ||c_i - c_j||^2)`
    spreads them, which needs two pairs at least. Source: Grassucci et al., "Closing the modality gap aligns group-wise
    semantics", arXiv 2601.18525, ICLR 2026.

    Args:
        align_weight: of the alignment of the pairs.
        uniformity_weight: of the uniformity of their centroids.
        t: of the uniformity.
        temperature: of InfoNCE.
        block_size: see `info_nce`.
    """

    align_weight: float = 1.0
    uniformity_weight: float = 1.0
    t: float = 2.0
    temperature: float = 0.07
    block_size: int | None = None

    def terms(self) -> list[Term]:
        options = {"temperature": self.temperature, "two_sided": True, "block_size": self.block_size}
        return [
            Term("info_nce", 1.0, partial(terms.contrast, **options)),
            Term("align", self.align_weight, partial(terms.alignment, alpha=2.0)),
            Term("uniform", self.uniformity_weight, self._uniformity),
        ]

    def _uniformity(self, batch: Batch) -> Tensor:
        return terms.uniformity(terms.pair_centroids(batch), self.t, batch)
