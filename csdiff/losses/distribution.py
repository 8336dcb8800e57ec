"""Objectives that compare the two distributions; each can be joined with InfoNCE on the pairs.

Every one is `weight * divergence(text side, image side) + info_nce_weight * InfoNCE(pairs)` on unit vectors; unpaired
embeddings enter the divergence alone.
"""

import math

import torch
from torch import Tensor

from .arguments import check_block_size, check_finite, check_positive, check_weight
from .bandwidth import Bandwidth, check_bandwidth
from .cauchy_schwarz import cauchy_schwarz_divergence
from .contrastive import info_nce
from .dense import unit_rows
from .kernel_terms import KernelOptions, log_mean_kernels
from .objective import Objective, ObjectiveOutput, apart_from_autocast, check_ignored, check_pairs, pool, weigh
from .process_group import global_rows


class DistributionLoss(Objective):
    """Base: a divergence between the sets of predicted and real unit vectors, and InfoNCE on the pairs if wanted.

    Args:
        weight: of the divergence, >= 0.
        info_nce_weight: of InfoNCE, >= 0; left out by default.
        temperature: of InfoNCE.
        two_sided: of InfoNCE.
    """

    uses_unpaired = True
    term: str

    def __init__(
        self,
        *,
        weight: float = 1.0,
        info_nce_weight: float = 0.0,
        temperature: float = 0.07,
        two_sided: bool = True,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(group=group)
        self.weight = check_weight("weight", weight)
        self.info_nce_weight = check_weight("info_nce_weight", info_nce_weight)
        if self.weight + self.info_nce_weight == 0:
            raise ValueError("weight or info_nce_weight must be > 0; found both 0")
        self.temperature, self.two_sided = check_positive("temperature", temperature), two_sided
        self.uses_unpaired = self.weight > 0 and type(self).uses_unpaired

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        prediction: Tensor,
        image: Tensor,
        *,
        unpaired_text: Tensor | None = None,
        unpaired_image: Tensor | None = None,
        **ignored: Tensor | None,
    ) -> ObjectiveOutput:
        check_ignored(ignored)
        check_pairs(prediction, image)
        parts = []
        if self.weight:
            all_text = pool(prediction, unpaired_text, "unpaired_text")
            all_image = pool(image, unpaired_image, "unpaired_image")
            parts.append((self.term, self.weight, self.divergence(all_text, all_image)))
        if self.info_nce_weight:
            pairs = info_nce(
                prediction,
                image,
                temperature=self.temperature,
                two_sided=self.two_sided,
                normalize=True,
                group=self.group,
            )
            parts.append(("info_nce", self.info_nce_weight, pairs))
        return weigh(parts)

    def gathered(self, rows: Tensor) -> Tensor:
        """Unit rows of all processes, differentiable."""
        rows = global_rows("rows", rows, self.group)
        check_finite("rows", rows.detach())
        return unit_rows(rows)


class CauchySchwarzLoss(DistributionLoss):
    """The Cauchy-Schwarz divergence alone; options as for `cauchy_schwarz_divergence`."""

    term = "cs"

    def __init__(self, *, bandwidth: Bandwidth = 0.5, diagonal: bool = True, block_size: int | None = None, **options):
        super().__init__(**options)
        check_bandwidth(bandwidth)
        check_block_size(block_size)
        self.bandwidth, self.diagonal, self.block_size = bandwidth, diagonal, block_size

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        return cauchy_schwarz_divergence(
            prediction,
            image,
            bandwidth=self.bandwidth,
            diagonal=self.diagonal,
            normalize=True,
            block_size=self.block_size,
            group=self.group,
        )


class MMDLoss(CauchySchwarzLoss):
    """Squared maximum mean discrepancy `V(x, x) + V(y, y) - 2 V(x, y)` from the same kernel sums.

    `diagonal=False` gives the unbiased estimate. Source: Gretton et al., "A kernel two-sample test", 2012.
    """

    term = "mmd"

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        options = KernelOptions(self.bandwidth, self.diagonal, True, self.block_size, self.group)
        # As exp - 1, which keeps the digits of wide kernels; the ones cancel.
        xx, yy, xy = (torch.expm1(term) for term in log_mean_kernels(prediction, image, options))
        return (xx + yy - 2 * xy).to(torch.promote_types(prediction.dtype, torch.float32))


class SinkhornLoss(DistributionLoss):
    """Debiased Sinkhorn divergence with squared Euclidean cost, by the package geomloss (extra `csdiff[losses]`).

    Args:
        blur: the width at which the transport is smoothed, in the units of unit vectors.
        scaling: annealing from coarse to fine; nearer to 1 is slower and more exact.

    Raises:
        ImportError: geomloss is not installed.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019.
    """

    term = "sinkhorn"

    def __init__(self, *, blur: float = 0.1, scaling: float = 0.5, **options):
        super().__init__(**options)
        try:
            from geomloss import SamplesLoss
        except ImportError as error:
            raise ImportError(
                "the objective sinkhorn needs the package geomloss, found none: pip install 'csdiff[losses]'"
            ) from error
        self.blur, self.scaling = check_positive("blur", blur), check_positive("scaling", scaling)
        self.sinkhorn = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, backend="tensorized")

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        return apart_from_autocast(self.sinkhorn, self.gathered(prediction), self.gathered(image))


class CoralLoss(DistributionLoss):
    """Deep CORAL: `||cov(x) - cov(y)||_F^2 / (4 D^2)`, plus `mean_weight ||mean(x) - mean(y)||^2`.

    As published it compares covariances alone (`mean_weight=0`) and so leaves the distance of the centroids as it is.
    Source: Sun, Saenko, "Deep CORAL", 2016.
    """

    term = "coral"

    def __init__(self, *, mean_weight: float = 0.0, **options):
        super().__init__(**options)
        self.mean_weight = check_weight("mean_weight", mean_weight)

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        return apart_from_autocast(self._gap, self.gathered(prediction), self.gathered(image))

    def _gap(self, x: Tensor, y: Tensor) -> Tensor:
        if min(len(x), len(y)) < 2:
            raise ValueError(f"coral needs at least two rows on each side; found {len(x)} and {len(y)}")
        gap = (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * x.shape[1] ** 2)
        if self.mean_weight:
            gap = gap + self.mean_weight * (x.mean(dim=0) - y.mean(dim=0)).square().sum()
        return gap


class KernelKLLoss(DistributionLoss):
    """Kullback-Leibler divergence of kernel density estimates: `mean_i [log q(y_i) - log p(y_i)]`, y the images.

    `log q(y_i) = log mean_{j != i} k(y_i, y_j)`, `log p(y_i) = log mean_j k(y_i, x_j)`. `reverse=True` takes the
    divergence of the predictions from the images instead. All pairs at once: memory grows with the square of the sets.
    """

    term = "kl"

    def __init__(self, *, bandwidth: float = 0.5, reverse: bool = False, **options):
        super().__init__(**options)
        self.bandwidth, self.reverse = check_positive("bandwidth", bandwidth), reverse

    def divergence(self, prediction: Tensor, image: Tensor) -> Tensor:
        return apart_from_autocast(self._kl, self.gathered(prediction), self.gathered(image))

    def _kl(self, x: Tensor, y: Tensor) -> Tensor:
        at, other = (x, y) if self.reverse else (y, x)
        if len(at) < 2:
            raise ValueError(f"kl needs at least two rows on the side it averages over; found {len(at)}")
        own = self._exponents(at, at).fill_diagonal_(-math.inf).logsumexp(dim=1) - math.log(len(at) - 1)
        cross = self._exponents(at, other).logsumexp(dim=1) - math.log(len(other))
        return (own - cross).mean()

    def _exponents(self, a: Tensor, b: Tensor) -> Tensor:
        # Of unit vectors: ||a - b||^2 = 2 - 2 a.b
        return (a @ b.T - 1) / self.bandwidth**2
