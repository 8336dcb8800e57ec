"""The training loop: batches in, updated weights, averages and numbers out."""

import time
from collections.abc import Iterator

import torch

from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.gradient_cache import Rows
from csdiff.training.schedule import learning_rate_factor
from csdiff.training.state import Progress
from csdiff.training.task import AlignmentTask, NonFinite


def make_optimizer(task: AlignmentTask, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the task's weights: decay on matrices only, fused where the device has it."""
    decayed = {
        name
        for name, p in task.parameters.items()
        if p.ndim >= 2 and name.startswith("embedder.") and "norm" not in name
    }
    groups = [
        {
            "params": [p for n, p in task.parameters.items() if n in decayed],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for n, p in task.parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    types = {p.device.type for p in task.parameters.values()}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        fused=types <= {"cpu", "cuda", "xpu", "mps"},
    )


class Loop:
    """One optimizer step after another.

    Every random draw of a step follows from seed, step, rank and micro-batch, so that a resumed run draws what an
    uninterrupted one would have drawn.

    Args:
        config: The run.
        task: What is trained.
        optimizer: Over the task's weights.
        scaler: Loss scaler of float16; disabled otherwise.
        rank: Of this process.
    """

    def __init__(self, config: TrainConfig, task: AlignmentTask, optimizer, scaler, rank: int = 0):
        self.config, self.task, self.optimizer, self.scaler = config, task, optimizer, scaler
        self.rank = rank
        self.progress = Progress()

    def step(self, batch: Rows) -> dict[str, torch.Tensor | float] | None:
        """One update; returns the numbers to log, or None when the step was skipped.

        Raises:
            CSDiffError: after too many skipped steps in a row.
        """
        config, progress = self.config, self.progress
        factor = learning_rate_factor(config.schedule, progress.step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        try:
            output = self.task.backward(
                batch,
                config.micro_batch_size,
                scale=self.scaler.scale,
                reseed=self._reseed,
            )
            self.task.average_gradients()
            norm = self._clip()
            reason = None if torch.isfinite(norm) else "the gradient is not finite"
        except NonFinite as problem:
            output, norm, reason = None, None, str(problem)
        progress.step += 1
        if reason is not None:
            self._skip(reason)
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.ema.update(progress.step - progress.skipped)
        progress.skipped_in_a_row = 0
        return {
            "loss": output.loss.detach(),
            **{name: value for name, value in output.terms.items() if name != "loss"},
            "grad_norm": norm,
            "learning_rate": config.learning_rate * factor,
        }

    def _reseed(self, micro_batch: int) -> None:
        # Odd multipliers spread the counters over the seed's 64 bits; equal streams would need equal counters.
        seed = self.config.seed * 0x9E3779B97F4A7C15 + self.progress.step * 0xBF58476D1CE4E5B9
        seed += self.rank * 0x94D049BB133111EB + micro_batch * 0xD6E8FEB86659FD93
        torch.manual_seed(seed % 2**63)

    def _clip(self) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        weights = list(self.task.parameters.values())
        limit = self.config.optimizer.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(weights, limit if limit > 0 else float("inf"))

    def _skip(self, reason: str) -> None:
        progress = self.progress
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            # Overflow is how the scaler finds its range: halve it, as it would itself.
            self.scaler.update(self.scaler.get_scale() / 2)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TooManySkipped(progress, reason)
        self.skip_reason = reason

    skip_reason: str | None = None


class TooManySkipped(CSDiffError):
    """Training has broken down; the caller names the last good checkpoint."""

    def __init__(self, progress: Progress, reason: str):
        super().__init__(
            f"Stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row were skipped because "
            f"{reason}"
        )


def batches(loaders: dict[str, Iterator[dict]], prepare) -> Iterator[Rows]:
    """Rows of every group side by side, prepared for the device."""
    for parts in zip(*loaders.values(), strict=True):
        yield prepare(dict(zip(loaders, parts, strict=True)))


class Throughput:
    """Samples a second over the recent past."""

    def __init__(self, batch_size: int):
        self.batch_size, self.start, self.steps, self.last = batch_size, time.perf_counter(), 0, 0.0

    def count(self) -> None:
        """One step more."""
        self.steps += 1

    def rate(self) -> float:
        """Samples a second since the last call."""
        now = time.perf_counter()
        self.last = self.batch_size * self.steps / max(now - self.start, 1e-9)
        self.start, self.steps = now, 0
        return self.last
