"""What every training objective is: a module from predictions and real embeddings to a loss and its terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class ObjectiveOutput:
    """`loss`, the scalar to differentiate, and `terms`, its detached unweighted parts by name, for the log."""

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Base of all objectives; the shared call is described at `forward`.

    Class attributes say what `forward` makes use of beyond the pairs; the rest is accepted and ignored:
    `uses_unpaired`, `uses_tokens`, `uses_source_text`.
    """

    uses_unpaired: bool = False
    uses_tokens: bool = False
    uses_source_text: bool = False
