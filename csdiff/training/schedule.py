"""The learning rate as a function of the step alone, so that a resumed run needs no state."""

import math

from csdiff.training.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, max_steps: int) -> int:
    """Steps of warm-up: as configured, else 5% of the run and at most 500."""
    return min(500, max_steps // 20) if config.warmup_steps is None else config.warmup_steps


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Factor on the peak learning rate for the update after `step` updates.

    Linear warm-up from `1 / warmup`, then with `u` in [0, 1] the part of the rest that is done:
    cosine `f + (1 - f) (1 + cos(pi u)) / 2`, linear `1 - (1 - f) u`, constant 1; `f` is `final_ratio`.
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    shape = (1 + math.cos(math.pi * done)) / 2 if config.name == "cosine" else 1 - done
    return config.final_ratio + (1 - config.final_ratio) * shape
