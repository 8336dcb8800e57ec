"""What every training objective is: a weighted sum of named terms of predicted and real embeddings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from csdiff.losses.arguments import check_block_size, check_matrix, check_positive, check_weight
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


@dataclass
class Batch:
    """The inputs of an objective, as `Objective.forward` takes them."""

    prediction: Tensor
    image: Tensor
    source_text: Tensor | None
    unpaired_text: Tensor | None
    unpaired_image: Tensor | None
    text_tokens: Tensor | None
    image_tokens: Tensor | None
    text_mask: Tensor | None
    image_mask: Tensor | None
    group: torch.distributed.ProcessGroup | None

    def __post_init__(self):
        check_matrix("prediction", self.prediction)
        check_matrix("image", self.image)
        if self.prediction.shape != self.image.shape:
            raise ValueError(
                "prediction and image must be pairs of one shape; "
                f"found {tuple(self.prediction.shape)} and {tuple(self.image.shape)}"
            )

    def pooled(self) -> tuple[Tensor, Tensor]:
        """All predictions and all images, those without a partner too."""
        sides = (self.prediction, self.unpaired_text, "text"), (self.image, self.unpaired_image, "image")
        return tuple(_pool(paired, unpaired, f"unpaired_{side}") for paired, unpaired, side in sides)


def _pool(paired: Tensor, unpaired: Tensor | None, name: str) -> Tensor:
    if unpaired is None:
        return paired
    check_matrix(name, unpaired)
    if unpaired.shape[1] != paired.shape[1]:
        raise ValueError(
            f"{name} must have D = {paired.shape[1]} as the pairs do; found shape {tuple(unpaired.shape)}"
        )
    return torch.cat([paired, unpaired])


class Term(NamedTuple):
    """One summand: its name, its weight, and its value for a batch, None where the batch has nothing for it.

    `reads` names what it looks at beside the pairs: "unpaired", "tokens", "source_text" or nothing.
    """

    name: str
    weight: float
    value: Callable[[Batch], Tensor | None]
    reads: str = ""


@dataclass(kw_only=True, eq=False, repr=False)
class Objective(nn.Module):
    """Base of the objectives: a dataclass of options, whose `terms` say what is added up.

    A class adds its options as fields with defaults, fit for JSON, and defines `terms`. Options are checked by their
    names, see `check_option`.

    Args:
        group: every process of it passes its share of the batch and gets the loss of the whole; see
            `cauchy_schwarz_divergence`.

    Raises:
        ValueError: an option out of its range, no weight > 0, shapes that do not fit.
    """

    group: torch.distributed.ProcessGroup | None = None

    # Whether an objective of the class can make use of unpaired rows; an instance says what its weights make use of.
    uses_unpaired: ClassVar[bool] = False

    def __post_init__(self):
        super().__init__()
        for option in self.options():
            setattr(self, option, check_option(option, getattr(self, option)))
        if getattr(self, "learnable_temperature", False):
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature), dtype=torch.float32))
            if self.temperature < LEAST_TEMPERATURE:
                raise ValueError(
                    f"temperature must be at least {LEAST_TEMPERATURE} with learnable_temperature=True, the bound it "
                    f"is held above while it learns; found {self.temperature}"
                )
        reads = {term.reads for term in self.terms() if term.weight}
        if not reads:
            weights = {option: getattr(self, option) for option in self.options() if option.endswith("weight")}
            raise ValueError(f"at least one weight must be > 0; found {weights}")
        self.uses_unpaired = "unpaired" in reads
        self.uses_tokens = "tokens" in reads
        self.uses_source_text = "source_text" in reads

    def options(self) -> list[str]:
        """The names of the options."""
        return [option.name for option in fields(self) if option.name != "group"]

    def extra_repr(self) -> str:
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in self.options())

    def terms(self) -> list[Term]:
        """The summands; one of weight 0 is not computed."""
        raise NotImplementedError

    def current_temperature(self) -> float | Tensor:
        """InfoNCE's temperature: the option, or where it is learnable the parameter's, never below its bound."""
        if not self.learnable_temperature:
            return self.temperature
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))
        return self.log_temperature.exp()

    def forward(
        self,
        prediction: Tensor,
        image: Tensor,
        *,
        source_text: Tensor | None = None,
        unpaired_text: Tensor | None = None,
        unpaired_image: Tensor | None = None,
        text_tokens: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of a batch. Embeddings are raw: normalising happens inside.

        Args:
            prediction: `(B, D)` adapted text embeddings.
            image: `(B, D)` embeddings of their images, row by row.
            source_text: `(B, D)` text embeddings before the adapter.
            unpaired_text: `(P, D)` adapted captions without images.
            unpaired_image: `(Q, D)` images without captions.
            text_tokens: `(B, L, D)`.
            image_tokens: `(B, V, D)`.
            text_mask: `(B, L)` boolean, True for a token.
            image_mask: `(B, V)` boolean.
        """
        batch = Batch(
            prediction,
            image,
            source_text,
            unpaired_text,
            unpaired_image,
            text_tokens,
            image_tokens,
            text_mask,
            image_mask,
            self.group,
        )
        found = {term.name: (term.weight, term.value(batch)) for term in self.terms() if term.weight}
        found = {name: (weight, value) for name, (weight, value) in found.items() if value is not None}
        if not found:
            raise ValueError("only token_weight is > 0, but no tokens were given")
        loss = sum(weight * value for weight, value in found.values())
        return ObjectiveOutput(loss, {name: value.detach() for name, (_, value) in found.items()})


def check_option(name: str, value: object) -> object:
    """The value of an option, as a plain number where it is one, or ValueError by what its name stands for."""
    if name.endswith("weight"):
        return check_weight(name, value)
    if name in ("temperature", "alpha", "t", "blur", "scaling"):
        return check_positive(name, value)
    if name == "bandwidth" or (name == "token_bandwidth" and value is not None):
        check_bandwidth(value)
    if name == "block_size":
        check_block_size(value)
    if name in ("rows", "regression_rows") and value not in REGRESSION_ROWS:
        raise ValueError(f"{name} must be one of {', '.join(REGRESSION_ROWS)}; found {value!r}")
    return value
