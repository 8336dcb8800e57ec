"""The losses written plainly: all pairs at once, in float64, differentiable as often as one likes.

The yardstick of the tests, and the road of a second derivative; memory grows with the product of the set sizes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_log_mean_kernel(x: Tensor, y: Tensor | None, widths: tuple[float, ...], *, diagonal: bool = True) -> Tensor:
    """`log mean_ij mean_k exp(-||x_i - y_j||^2 / (2 width_k^2))` in float64; without `y` over the pairs of `x`."""
    x = x.double()
    other = x if y is None else y.double()
    centre = (x.detach().mean(dim=0) + other.detach().mean(dim=0)) / 2
    x, other = x - centre, other - centre
    square = (x.square().sum(1)[:, None] + other.square().sum(1)[None, :] - 2 * x @ other.T).clamp_min(0)
    exponents = torch.stack([-square / (2 * width**2) for width in widths])
    pairs = square.numel()
    if y is None:
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        exponents = exponents.masked_fill(own, 0.0 if diagonal else -math.inf)
        pairs -= 0 if diagonal else len(x)
    return exponents.flatten().logsumexp(0) - math.log(pairs * len(widths))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 or better; a zero row stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def differentiable_info_nce(
    ctx, x: Tensor, y: Tensor, temperature: Tensor | float, grad: Tensor, normalize: bool, two_sided: bool
) -> tuple[Tensor | None, ...]:
    """`grad` times the gradients of InfoNCE by x, y and the temperature, those that `ctx` asks for, differentiable."""
    with torch.enable_grad():
        a, b = x.double(), y.double()
        if normalize:
            a, b = unit_rows(a), unit_rows(b)
        if isinstance(temperature, Tensor):
            scale = 1 / temperature.to(a.device, a.dtype).reshape(())
        else:
            scale = 1 / temperature
        logits = a @ b.T * scale
        target = torch.arange(len(a), device=a.device)
        value = F.cross_entropy(logits, target)
        if two_sided:
            value = (value + F.cross_entropy(logits.T, target)) / 2
        inputs = [t for t, needed in zip((x, y, temperature), ctx.needs_input_grad, strict=False) if needed]
        found = list(torch.autograd.grad(value * grad, inputs, create_graph=True))
    return tuple(found.pop(0) if needed else None for needed in ctx.needs_input_grad[:3])
