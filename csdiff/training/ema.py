"""Exponential moving average of the trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """`average <- d average + (1 - d) weight` after every step, with `d = min(decay, (1 + t) / (10 + t))`.

    The growing decay forgets the random start of short runs. The average is float32 whatever the model computes in.

    Args:
        parameters: Trainable parameters by name.
        decay: Weight of the past; 0 keeps the last weights.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.average.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model, and the online ones back afterwards, bit for bit."""
        online = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(online)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def load(self, average: dict[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, value in self.average.items():
            value.copy_(average[name])
