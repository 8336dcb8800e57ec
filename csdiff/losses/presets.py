"""The objectives by name: each is a table of terms and the options that they read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from csdiff.losses import terms
from csdiff.losses.objective import Objective, Preset, Term


@dataclass(kw_only=True, eq=False, repr=False)
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
    group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self):
        super().__init__(OBJECTIVES["cs_aligner"], **vars(self))


_KERNEL = {"bandwidth": 0.5, "diagonal": True, "block_size": None}


def beside_contrast(name: str, divergence: Callable, check: Callable | None = None, **options: object) -> Preset:
    """`weight * divergence(all text, all images) + info_nce_weight * InfoNCE(pairs)`, without InfoNCE by default."""
    table = {name: Term(divergence, "weight", "unpaired"), "info_nce": Term(terms.contrast, "info_nce_weight")}
    shared = {"weight": 1.0, "info_nce_weight": 0.0, "temperature": 0.07, "two_sided": True}
    return Preset(table, {**shared, **options}, check)


OBJECTIVES: dict[str, Preset] = {
    "cs_aligner": Preset(
        {
            "info_nce": Term(terms.contrast, "info_nce_weight"),
            "cs": Term(terms.divergence, "cs_weight", "unpaired"),
            "tokens": Term(terms.token_divergence, "token_weight", "tokens"),
            "source": Term(terms.contrast_with_source, "source_weight", "source_text"),
            "regression": Term(terms.regression, "regression_weight"),
        },
        {option.name: option.default for option in fields(CSAlignerLoss) if option.name != "group"},
    ),
    "cs": beside_contrast("cs", terms.divergence, **_KERNEL),
    "info_nce": Preset(
        {"info_nce": Term(terms.contrast)},
        {"temperature": 0.07, "learnable_temperature": False, "two_sided": True, "block_size": None},
    ),
    "mse": Preset({"mse": Term(terms.regression)}, {"rows": "raw"}),
    # The published weight.
    "eclipse": Preset(
        {
            "mse": Term(terms.regression),
            "contrast": Term(terms.contrast_with_source, "contrast_weight", "source_text"),
        },
        {"contrast_weight": 0.2, "temperature": 0.07, "rows": "raw", "block_size": None},
    ),
    "mmd": beside_contrast("mmd", terms.discrepancy, **_KERNEL),
    "sinkhorn": beside_contrast("sinkhorn", terms.sinkhorn, terms.check_geomloss, blur=0.1, scaling=0.5),
    "coral": beside_contrast("coral", terms.coral, mean_weight=0.0),
    "kl": beside_contrast("kl", terms.kernel_kl, terms.check_width, bandwidth=0.5, reverse=False),
    "uniform_align": Preset(
        {"align": Term(terms.alignment), "uniform": Term(terms.uniformity, "uniformity_weight")},
        {"alpha": 2.0, "t": 2.0, "uniformity_weight": 1.0},
    ),
    "modgap": Preset(
        {
            "info_nce": Term(terms.contrast),
            "align": Term(terms.alignment, "align_weight"),
            "uniform": Term(terms.centroid_uniformity, "uniformity_weight"),
        },
        {"align_weight": 1.0, "uniformity_weight": 1.0, "t": 2.0, "temperature": 0.07, "block_size": None},
    ),
}


def objective_options(name: str) -> dict[str, object]:
    """The options of the objective `name` with their defaults; all of them are fit for JSON."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; the objectives are {', '.join(OBJECTIVES)}")
    options = OBJECTIVES[name].options.items()
    return {option: list(value) if isinstance(value, tuple) else value for option, value in options}


def build_objective(name: str, *, group: torch.distributed.ProcessGroup | None = None, **options: object) -> Objective:
    """The objective `name` with the given options; the others keep their defaults.

    Raises:
        ValueError: an unknown name or option, with the known ones; a value the objective refuses.
        ImportError: "sinkhorn" without geomloss.
    """
    known = objective_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown options {unknown} of the objective {name!r}; its options are {', '.join(known)}")
    return Objective(OBJECTIVES[name], group=group, **options)
