"""Scalars whose gradient is found together with their value, outside autocast."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The context in which autocast is off; entering one costs time, so none is entered where it is off already."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def with_gradient(
    evaluate: Callable[[Sequence[bool]], tuple[Tensor, Sequence[Tensor | None]]], *inputs: Tensor
) -> Tensor:
    """The scalar that `evaluate(needed)` returns, differentiable by the gradients that it returns beside it.

    `needed` says of each input whether its gradient is wanted; None stands for the others. It runs without autograd
    and without autocast.
    """
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    with without_autocast(inputs[0].device):
        return _WithGradient.apply(evaluate, needed, *inputs)


def apart_from_autocast(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The scalar `function(*inputs)`, its value and gradient computed by autograd as if there were no autocast."""

    def evaluate(needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            value = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, wanted) if wanted else ())
        return value.detach(), [next(found) if leaf.requires_grad else None for leaf in leaves]

    return with_gradient(evaluate, *inputs)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, evaluate, needed, *inputs):
        value, gradients = evaluate(needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the losses have no second derivative, which create_graph=True asks for: take the first with "
                "create_graph=False, or write the loss with dense tensors where a second is needed"
            )
        found = (
            None if one is None else (one * grad.to(one.device, one.dtype)).to(dtype)
            for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *found
