"""The objectives by name: each is a table of terms and the options that they read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from csdiff.losses import terms
from csdiff.losses.arguments import check_number
from csdiff.losses.objective import Objective, Term

objective = dataclass(kw_only=True, eq=False, repr=False)


@objective
class CSAlignerLoss(Objective):
    r"""`info_nce_weight * InfoNCE(pairs) + cs_weight * D_CS(all text, all images) + token_weight * mean D_CS(tokens)`.

    InfoNCE pulls the two of a pair together and keeps captions apart, but leaves the two modalities apart as wholes;
    the Cauchy-Schwarz term pulls the two distributions onto each other and needs no pairs, so it also sees the
    unpaired embeddings. All rows are made unit vectors first. A term of weight 0 is not computed; the token term is
    added when tokens are given.

    ```python
    objective = CSAlignerLoss(cs_weight=8.0, bandwidth=[0.35, 0.5, 1.0])
    output = objective(adapter.embed(text), image)
    output.loss.backward()
    ```

    Args:
        info_nce_weight: weight of InfoNCE on the pairs, >= 0.
        cs_weight: weight of the Cauchy-Schwarz term, >= 0.
        token_weight: weight of the token-level term, >= 0.
        bandwidth: of the Cauchy-Schwarz term on unit vectors: a number, several (mean of the kernels), "median" or
            "silverman" (taken anew from each batch).
        diagonal: whether its within-set means include the pairs `i = j`.
        temperature: of InfoNCE.
        learnable_temperature: make it a parameter, held as its logarithm and never below 0.01, CLIP's bound; add the
            objective's parameters to the optimizer.
        two_sided: False leaves the direction "text picks its image" alone.
        token_bandwidth: of the token term; None takes that of the Cauchy-Schwarz term.
        token_diagonal: of the token term, likewise.
        source_weight: weight of one-way InfoNCE of the adapted text against the un-adapted text `source_text`, as in
            ECLIPSE; needs text and image of one dimension.
        regression_weight: weight of a mean squared error term.
        regression_rows: its rows: "raw", "unit" or "standardized", see `csdiff.losses.terms.regression`.
        block_size: see `cauchy_schwarz_divergence`.
        group: see `Objective`.

    Raises:
        ValueError: a weight < 0 or none > 0, bad options, a learnable temperature below 0.01, shapes that do not fit,
            one of `text_tokens` and `image_tokens` without the other.

    Source:
        Yin et al., "CS-Aligner", arXiv 2502.17028. The paper does not state weights, bandwidth or
        temperature; the defaults were chosen on validation rows, see `docs/results.md`.
    """

    info_nce_weight: float = 1.0
    cs_weight: float = 8.0
    token_weight: float = 1.0
    bandwidth: float | Sequence[float] | str = (0.35, 0.5, 1.0)
    diagonal: bool = True
    temperature: float = 0.07
    learnable_temperature: bool = False
    two_sided: bool = True
    token_bandwidth: float | Sequence[float] | str | None = None
    token_diagonal: bool | None = None
    source_weight: float = 0.0
    regression_weight: float = 0.0
    regression_rows: str = "unit"
    block_size: int | None = None

    uses_unpaired: ClassVar[bool] = True
    table = {
        "info_nce": Term(terms.contrast, "info_nce_weight"),
        "cs": Term(terms.divergence, "cs_weight", "unpaired"),
        "tokens": Term(terms.token_divergence, "token_weight", "tokens"),
        "source": Term(terms.contrast_with_source, "source_weight", "source_text"),
        "regression": Term(lambda o, batch: terms.regression(batch, o.regression_rows), "regression_weight"),
    }


@objective
class InfoNCELoss(Objective):
    """InfoNCE of the pairs on unit vectors, CLIP's loss; options as for `info_nce` and `CSAlignerLoss`."""

    temperature: float = 0.07
    learnable_temperature: bool = False
    two_sided: bool = True
    block_size: int | None = None

    table = {"info_nce": Term(terms.contrast)}


@objective
class ProjectionLoss(Objective):
    """Mean squared error alone: ECLIPSE's "Projection" baseline. `rows`: see `csdiff.losses.terms.regression`.

    Source: Patel et al., "ECLIPSE", arXiv 2312.04655.
    """

    rows: str = "raw"

    table = {"mse": Term(terms.squared_error)}


@objective
class EclipseLoss(Objective):
    """ECLIPSE: `MSE(prediction, image) + contrast_weight * InfoNCE(prediction against source_text)`.

    The contrast is one-way and against the *text* embeddings: the prediction picks its caption out of the batch, which
    keeps it near the language it came from. It needs `source_text`, of the images' dimension. 0.2 is the published
    weight; `rows`: see `csdiff.losses.terms.regression`.

    Source: Patel et al., "ECLIPSE: a resource-efficient text-to-image prior for image generations", CVPR 2024.
    """

    contrast_weight: float = 0.2
    temperature: float = 0.07
    rows: str = "raw"
    block_size: int | None = None

    table = {
        "mse": Term(terms.squared_error),
        "contrast": Term(terms.contrast_with_source, "contrast_weight", "source_text"),
    }


@objective
class DistributionLoss(Objective):
    """Base: `weight * divergence(all text, all images) + info_nce_weight * InfoNCE(pairs)` on unit vectors.

    Unpaired embeddings enter the divergence alone. A class makes its table with `beside_contrast`.
    """

    weight: float = 1.0
    info_nce_weight: float = 0.0
    temperature: float = 0.07
    two_sided: bool = True

    uses_unpaired: ClassVar[bool] = True


def beside_contrast(**divergence) -> dict[str, Term]:
    """The terms of a `DistributionLoss`, from the name of its divergence and the function that computes it."""
    ((name, value),) = divergence.items()
    return {name: Term(value, "weight", "unpaired"), "info_nce": Term(terms.contrast, "info_nce_weight")}


@objective
class CauchySchwarzLoss(DistributionLoss):
    """The Cauchy-Schwarz divergence alone; options as for `cauchy_schwarz_divergence`."""

    bandwidth: float | Sequence[float] | str = 0.5
    diagonal: bool = True
    block_size: int | None = None

    table = beside_contrast(cs=terms.divergence)


@objective
class MMDLoss(CauchySchwarzLoss):
    """Squared maximum mean discrepancy, see `squared_mmd`; `diagonal=False` gives the unbiased estimate."""

    table = beside_contrast(mmd=terms.discrepancy)


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

    table = beside_contrast(sinkhorn=terms.sinkhorn)

    def __post_init__(self):
        super().__post_init__()
        try:
            import geomloss  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "the objective sinkhorn needs the package geomloss, found none: pip install 'csdiff[losses]'"
            ) from error


@objective
class CoralLoss(DistributionLoss):
    """Deep CORAL: `||cov(x) - cov(y)||_F^2 / (4 D^2)`, plus `mean_weight ||mean(x) - mean(y)||^2`.

    As published it compares covariances alone (`mean_weight=0`) and so leaves the distance of the centroids as it is.
    Source: Sun, Saenko, "Deep CORAL", 2016.
    """

    mean_weight: float = 0.0

    table = beside_contrast(coral=terms.coral)


@objective
class KernelKLLoss(DistributionLoss):
    """Kullback-Leibler divergence of kernel density estimates: `mean_i [log q(y_i) - log p(y_i)]`, y the images.

    `log q(y_i) = log mean_{j != i} k(y_i, y_j)`, `log p(y_i) = log mean_j k(y_i, x_j)`. `reverse=True` takes the
    divergence of the predictions from the images instead. All pairs at once: memory grows with the square of the sets.
    """

    bandwidth: float = 0.5
    reverse: bool = False

    table = beside_contrast(kl=terms.kernel_kl)

    def __post_init__(self):
        self.bandwidth = check_number("bandwidth", self.bandwidth)
        super().__post_init__()


@objective
class UniformAlignLoss(Objective):
    """Alignment and uniformity: `mean_i ||x_i - y_i||^alpha + uniformity_weight (U(x) + U(y)) / 2` on unit vectors.

    `U(x) = log mean_{i != j} exp(-t ||x_i - x_j||^2)`, which needs two pairs at least. Source: Wang, Isola,
    "Understanding contrastive representation learning through alignment and uniformity on the hypersphere", 2020.
    """

    alpha: float = 2.0
    t: float = 2.0
    uniformity_weight: float = 1.0

    table = {"align": Term(terms.alignment), "uniform": Term(terms.uniformity, "uniformity_weight")}


@objective
class ModGapLoss(Objective):
    """ModGap: `InfoNCE + align_weight mean_i ||x_i - y_i||^2 + uniformity_weight U(c)` on unit vectors.

    `c_i = (x_i + y_i) / ||x_i + y_i||` are the pairs' centroids and `U(c) = log mean_{i != j} exp(-t ||c_i - c_j||^2)`
    spreads them, which needs two pairs at least. Source: Grassucci et al., "Closing the modality gap aligns group-wise
    semantics", arXiv 2601.18525, ICLR 2026.
    """

    align_weight: float = 1.0
    uniformity_weight: float = 1.0
    t: float = 2.0
    temperature: float = 0.07
    block_size: int | None = None

    alpha = 2.0
    table = {
        "info_nce": Term(terms.contrast),
        "align": Term(terms.alignment, "align_weight"),
        "uniform": Term(terms.centroid_uniformity, "uniformity_weight"),
    }


OBJECTIVES: dict[str, type[Objective]] = {
    "cs_aligner": CSAlignerLoss,
    "cs": CauchySchwarzLoss,
    "info_nce": InfoNCELoss,
    "mse": ProjectionLoss,
    "eclipse": EclipseLoss,
    "mmd": MMDLoss,
    "sinkhorn": SinkhornLoss,
    "coral": CoralLoss,
    "kl": KernelKLLoss,
    "uniform_align": UniformAlignLoss,
    "modgap": ModGapLoss,
}


def objective_options(name: str) -> dict[str, object]:
    """The options of the objective `name` with their defaults; all of them are fit for JSON."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; the objectives are {', '.join(OBJECTIVES)}")
    options = {option.name: option.default for option in fields(OBJECTIVES[name]) if option.name != "group"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def build_objective(name: str, *, group: torch.distributed.ProcessGroup | None = None, **options: object) -> Objective:
    """The objective `name` with the given options; the others keep their defaults.

    Raises:
        ValueError: an unknown name or option, with the known ones; a value the objective refuses.
    """
    known = objective_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown options {unknown} of the objective {name!r}; its options are {', '.join(known)}")
    return OBJECTIVES[name](group=group, **options)
