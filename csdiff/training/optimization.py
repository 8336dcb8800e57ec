"""Optimizer, learning rate and running average of the weights."""

import math

import torch
from torch import Tensor, nn

from csdiff.training.config import ScheduleConfig, TrainConfig


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, fused where the device has it, with decay on matrices only: not on norms, vectors, and the objective."""
    options = config.optimizer
    decayed, others = [], []
    for name, p in parameters.items():
        matrix = p.ndim >= 2 and name.startswith("embedder.") and "norm" not in name
        (decayed if matrix else others).append(p)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    types = {p.device.type for p in parameters.values()}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=types <= {"cpu", "cuda", "xpu", "mps"},
    )


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Factor on the peak learning rate for the update after `step` updates, so that a resumed run needs no state.

    Linear warm-up from `1 / warmup`, then with `u` in [0, 1] the part of the rest that is done:
    cosine `f + (1 - f) (1 + cos(pi u)) / 2`, linear `1 - (1 - f) u`, constant 1; `f` is `final_ratio`.
    """
    warmup = min(500, max_steps // 20) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    shape = (1 + math.cos(math.pi * done)) / 2 if config.name == "cosine" else 1 - done
    return config.final_ratio + (1 - config.final_ratio) * shape


class EMA:
    """`average <- d average + (1 - d) weight` after every step, with `d = min(decay, (1 + t) / (10 + t))`.

    The growing decay forgets the random start of short runs. Unlike diffusers' `EMAModel`, decay 0 gives the weights
    bit for bit, and averages have names, as checkpoints want them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.decay, self.parameters = decay, parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)


@torch.no_grad()
def copy_weights(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy tensors by name; `source` must have all names of `target`."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
