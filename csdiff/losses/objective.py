"""What every training objective is: a weighted sum of named terms of predicted and real embeddings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csdiff.losses.arguments import check_block_size, check_matrix, check_number, check_same_width
from csdiff.losses.bandwidth import check_bandwidth

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
        check_matrix("prediction", self.prediction)
        self.check_pairs("image", self.image)

    def check_pairs(self, name: str, rows: Tensor) -> None:
        """Raise ValueError unless `rows` have the shape of the predictions."""
        check_matrix(name, rows)
        if self.prediction.shape != rows.shape:
            shapes = f"{tuple(self.prediction.shape)} and {tuple(rows.shape)}"
            raise ValueError(f"prediction and {name} must be pairs of one shape; found {shapes}")

    def pooled(self) -> list[Tensor]:
        """All predictions and all images, those without a partner too."""
        sides = [self.prediction, self.image]
        for side, name in enumerate(("unpaired_text", "unpaired_image")):
            unpaired = getattr(self, name)
            if unpaired is not None:
                check_matrix(name, unpaired)
                check_same_width(unpaired, self.image, (name, "image"))
                sides[side] = torch.cat([sides[side], unpaired])
        return sides


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
