"""What training minimises: weighted sums of named terms of predicted and real embeddings, a table of them by name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csdiff.errors import did_you_mean
from csdiff.losses import terms
from csdiff.losses.arguments import check_bandwidth, check_block_size, check_number
from csdiff.losses.terms import Batch

# CLIP's bound of a learnable temperature: logits of cosines reach 100.
LEAST_TEMPERATURE = 0.01
REGRESSION_ROWS = ("raw", "unit", "standardized")


@dataclass
class ObjectiveOutput:
    """`loss`, the scalar to differentiate, and `terms`, its detached parts by name, before their weights.

    A term can also be read as an attribute: `output.info_nce` is `output.terms["info_nce"]`.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def backward(self) -> None:
        """`loss.backward()`."""
        self.loss.backward()

    def __getattr__(self, name: str) -> Tensor:
        terms = self.__dict__.get("terms", {})
        if name in terms:
            return terms[name]
        raise AttributeError(f"no term {name!r} in this output; it has loss and {', '.join(terms) or 'no terms'}")


class Term(NamedTuple):
    """One summand of an objective.

    `value(objective, batch)` reads its options from the objective; None where the batch has nothing for it. `weight`
    names the option that holds its weight, None for 1. `reads` names what it looks at beside the pairs: "unpaired",
    "tokens", "source_text" or nothing.
    """

    value: Callable[[Any, Batch], Tensor | None]
    weight: str | None = None
    reads: str = ""


class Preset(NamedTuple):
    """What an objective is made of: terms by name, options with their defaults, and what else to check of these."""

    terms: dict[str, Term]
    options: dict[str, object]
    check: Callable[[Any], None] | None = None

    @property
    def uses_unpaired(self) -> bool:
        """Whether it can make use of unpaired rows; an objective says what its weights make use of."""
        return any(term.reads == "unpaired" for term in self.terms.values())


class Objective(nn.Module):
    """The weighted sum of the terms of a preset; `build_objective` makes it by name.

    Its options are attributes. They are checked by their names, see `check_option`.

    Args:
        preset: its terms and defaults.
        group: every process of it passes its share of the batch and gets the loss of the whole; see
            `cauchy_schwarz_divergence`.
        **options: those that differ from the defaults.

    Raises:
        ValueError: an option out of its range, no weight > 0, shapes that do not fit.
    """

    # What terms read where the preset has no such option.
    learnable_temperature, two_sided, block_size, alpha, rows = False, True, None, 2.0, None

    def __init__(
        self, preset: Preset, *, group: torch.distributed.ProcessGroup | None = None, **options: object
    ) -> None:
        super().__init__()
        self.preset, self.group = preset, group
        for option, value in {**preset.options, **options}.items():
            setattr(self, option, check_option(option, value))
        if preset.check is not None:
            preset.check(self)
        if self.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature), dtype=torch.float32))
            if self.temperature < LEAST_TEMPERATURE:
                raise ValueError(
                    f"temperature must be at least {LEAST_TEMPERATURE} with learnable_temperature=True, the bound it "
                    f"is held above while it learns; found {self.temperature}"
                )
        reads = {preset.terms[name].reads for name, weight in self.weights().items() if weight}
        if not reads:
            raise ValueError(f"at least one weight must be > 0; found {self.weights()}")
        self.uses_unpaired = "unpaired" in reads
        self.uses_tokens = "tokens" in reads
        self.uses_source_text = "source_text" in reads

    def weights(self) -> dict[str, float]:
        """The weight of each term; one of weight 0 is not computed."""
        return {name: getattr(self, term.weight) if term.weight else 1.0 for name, term in self.preset.terms.items()}

    def extra_repr(self) -> str:
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in self.preset.options)

    def current_temperature(self) -> float | Tensor:
        """InfoNCE's temperature: the option, or where it is learnable the parameter's, never below its bound."""
        if not self.learnable_temperature:
            return self.temperature
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))
        return self.log_temperature.exp()

    def forward(self, prediction: Tensor, image: Tensor, **inputs: Tensor | None) -> ObjectiveOutput:
        """The loss of a batch. Embeddings are raw: normalising happens inside.

        Args:
            prediction: `(B, D)` adapted text embeddings.
            image: `(B, D)` embeddings of their images, row by row.
            **inputs: what there is of `source_text` `(B, D)`, the text embeddings before the adapter; `unpaired_text`
                `(P, D)`, adapted captions without images; `unpaired_image` `(Q, D)`, images without captions;
                `text_tokens` `(B, L, D)` and `image_tokens` `(B, V, D)`, with the boolean `text_mask` `(B, L)` and
                `image_mask` `(B, V)`, True for a token.
        """
        batch = Batch(prediction=prediction, image=image, group=self.group, **inputs)
        weights = {name: weight for name, weight in self.weights().items() if weight}
        found = {name: self.preset.terms[name].value(self, batch) for name in weights}
        found = {name: value for name, value in found.items() if value is not None}
        if not found:
            raise ValueError("only token_weight is > 0, but no tokens were given")
        loss = sum(weights[name] * value for name, value in found.items())
        return ObjectiveOutput(loss, {name: value.detach() for name, value in found.items()})


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


def check_option(name: str, value: object) -> object:
    """The value of an option, as a plain number where it is one, or ValueError by what its name stands for."""
    if name.endswith("weight"):
        return check_number(name, value, zero=True)
    if name in ("temperature", "alpha", "t", "blur", "scaling"):
        return check_number(name, value)
    if name == "bandwidth" or (name == "token_bandwidth" and value is not None):
        check_bandwidth(value)
    if name == "block_size":
        check_block_size(value)
    if name in ("rows", "regression_rows") and value not in REGRESSION_ROWS:
        raise ValueError(f"{name} must be one of {', '.join(REGRESSION_ROWS)}; found {value!r}")
    return value


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
        near = did_you_mean(unknown[0], known)
        raise ValueError(
            f"unknown options {unknown} of the objective {name!r}; its options are {', '.join(known)}{near}"
        )
    return Objective(OBJECTIVES[name], group=group, **options)
