"""The learnable temperature of InfoNCE: a parameter in logarithm, with a floor."""

import math

import torch
from torch import Tensor, nn

from .arguments import check_positive

# CLIP's bound: logits of cosines reach 100.
LEAST_TEMPERATURE = 0.01


class _FlooredExponential(torch.autograd.Function):
    """`max(exp(l), floor)`; at the floor the gradient is kept where a step of descent leads up again."""

    @staticmethod
    def forward(ctx, log_temperature, floor):
        temperature = log_temperature.exp().clamp_min_(floor)
        ctx.save_for_backward(temperature)
        ctx.floor = floor
        return temperature.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (temperature,) = ctx.saved_tensors
        return torch.where((temperature > ctx.floor) | (grad < 0), grad * temperature, 0), None


def log_temperature_parameter(temperature: float) -> nn.Parameter:
    """A parameter that holds the logarithm of `temperature`, or ValueError if that is below the floor."""
    if temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be at least {LEAST_TEMPERATURE} with learnable_temperature=True, the bound it is held "
            f"above while it learns; found {temperature}: start higher, or fix it with learnable_temperature=False"
        )
    return nn.Parameter(torch.tensor(math.log(check_positive("temperature", temperature)), dtype=torch.float32))


def floored_temperature(log_temperature: Tensor) -> Tensor:
    """`exp(log_temperature)`, never below the floor."""
    return _FlooredExponential.apply(log_temperature, LEAST_TEMPERATURE)
