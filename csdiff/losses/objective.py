"""What every training objective is: a module from predicted and real embeddings to a loss and its terms."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .arguments import check_matrix

INPUTS = (
    "source_text",
    "unpaired_text",
    "unpaired_image",
    "text_tokens",
    "image_tokens",
    "text_mask",
    "image_mask",
)


@dataclass
class ObjectiveOutput:
    """`loss`, the scalar to differentiate, and `terms`, its detached parts by name, before their weights.

    A term can also be read as an attribute: `output.info_nce` is `output.terms["info_nce"]`.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        terms = self.__dict__.get("terms", {})
        if name in terms:
            return terms[name]
        raise AttributeError(f"no term {name!r} in this output; it has {', '.join(terms) or 'none'}")


class Objective(nn.Module):
    """Base of the objectives; constructor arguments are keywords, fit for JSON but for `group`, and have defaults.

    `forward(prediction, image, *, source_text=None, unpaired_text=None, unpaired_image=None, text_tokens=None,
    image_tokens=None, text_mask=None, image_mask=None) -> ObjectiveOutput`

    - `prediction` `(B, D)`: the adapter's raw image-space embeddings of the captions, `image` `(B, D)`: raw embeddings
      of their images, row by row. Normalising happens inside.
    - `source_text` `(B, D)`: the captions' text embeddings before the adapter.
    - `unpaired_text` `(P, D)`, `unpaired_image` `(Q, D)`: adapted captions without images, images without captions.
    - `text_tokens` `(B, L, D)`, `image_tokens` `(B, V, D)`, with boolean masks.

    The attributes `uses_unpaired`, `uses_tokens`, `uses_source_text` say which of these an objective makes use of; it
    accepts and ignores the others. With `group` every process passes its share of the batch and gets the loss of the
    whole; see `cauchy_schwarz_divergence`.
    """

    uses_unpaired: bool = False
    uses_tokens: bool = False
    uses_source_text: bool = False

    def __init__(self, *, group: torch.distributed.ProcessGroup | None = None):
        super().__init__()
        self.group = group


def check_ignored(inputs: dict[str, Tensor | None]) -> None:
    """Raise TypeError if an objective was given an input that none knows: a misspelt one must not be ignored."""
    unknown = sorted(set(inputs) - set(INPUTS))
    if unknown:
        raise TypeError(f"unknown inputs {unknown}; objectives take {', '.join(INPUTS)}")


def check_pairs(prediction: Tensor, image: Tensor, names: tuple[str, str] = ("prediction", "image")) -> None:
    """Raise ValueError unless both are floating-point `(B, D)` tensors of one shape."""
    for name, rows in zip(names, (prediction, image), strict=True):
        check_matrix(name, rows)
    if prediction.shape != image.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must be pairs of one shape; "
            f"found {tuple(prediction.shape)} and {tuple(image.shape)}"
        )


def pool(paired: Tensor, unpaired: Tensor | None, name: str) -> Tensor:
    """The rows of a paired and an unpaired set together."""
    if unpaired is None:
        return paired
    check_matrix(name, unpaired)
    if unpaired.shape[1] != paired.shape[1]:
        raise ValueError(
            f"{name} must have D = {paired.shape[1]} as the pairs do; found shape {tuple(unpaired.shape)}"
        )
    return torch.cat([paired, unpaired])


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad(), torch.autocast(device_type=inputs[0].device.type, enabled=False):
            ctx.value = function(*ctx.inputs)
        return ctx.value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needed = [t for t in ctx.inputs if t.requires_grad]
        with torch.autocast(device_type=grad.device.type, enabled=False):
            found = list(torch.autograd.grad(ctx.value, needed, grad, retain_graph=True))
        return None, *(found.pop(0) if t.requires_grad else None for t in ctx.inputs)


def apart_from_autocast(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, its value and its gradient both computed as if there were no autocast."""
    return _Apart.apply(function, *inputs)


def weigh(parts: list[tuple[str, float, Tensor]]) -> ObjectiveOutput:
    """The weighted sum of named terms."""
    loss = sum(weight * term for _, weight, term in parts)
    return ObjectiveOutput(loss, {name: term.detach() for name, _, term in parts})
