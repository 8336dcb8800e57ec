"""One optimizer step after another: batches in, updated weights, averages and numbers out."""

from dataclasses import dataclass, field

import torch

from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.gradient_cache import Rows
from csdiff.training.optimization import learning_rate_factor
from csdiff.training.task import AlignmentTask, NonFinite


@dataclass
class Progress:
    """Counters of a run. Sample order, dropout and noise follow from seed and step and need no state."""

    step: int = 0
    """Batches seen, the skipped ones included."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0
    """Of these, the current run of them."""
    best_step: int | None = None
    """Checkpointed step with the best validation metric."""
    best_value: float | None = None
    """Its value."""
    validation_left: bool = False
    """A signal ended the validation of this step."""
    seconds: float = 0.0
    """Training time over all launches."""
    baselines: dict = field(default_factory=dict)
    """Validation metrics of the data's own baselines."""


class Loop:
    """Makes the steps of a run.

    Every random draw of a step follows from seed, step, rank and micro-batch, so that a resumed run draws what an
    uninterrupted one would have drawn.

    Args:
        config: The run.
        task: What is trained.
        optimizer: Over the task's weights.
        scaler: Loss scaler of float16; disabled otherwise.
        rank: Of this process.

    Attributes:
        progress: Counters.
        skip_reason: Why the last skipped step was skipped.
    """

    def __init__(self, config: TrainConfig, task: AlignmentTask, optimizer, scaler, rank: int = 0):
        self.config, self.task, self.optimizer, self.scaler = config, task, optimizer, scaler
        self.rank, self.progress, self.skip_reason = rank, Progress(), ""

    def step(self, batch: Rows) -> dict[str, torch.Tensor | float] | None:
        """One update; returns the numbers to log, or None when the step was skipped.

        Raises:
            CSDiffError: after too many skipped steps in a row.
        """
        config, progress = self.config, self.progress
        rate = config.learning_rate * learning_rate_factor(config.schedule, progress.step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            output = self.task.backward(batch, config.micro_batch_size, scale=self.scaler.scale, reseed=self._reseed)
            self.task.average_gradients()
            norm = self._clip()
            reason = None if torch.isfinite(norm) else "the gradient is not finite"
        except NonFinite as problem:
            reason = str(problem)
        progress.step += 1
        if reason is not None:
            self._skip(reason)
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.ema.update(progress.step - progress.skipped)
        progress.skipped_in_a_row = 0
        return {"loss": output.loss.detach(), **output.terms, "grad_norm": norm, "learning_rate": rate}

    def _reseed(self, micro_batch: int) -> None:
        # Odd multipliers spread the counters over the seed's 64 bits; equal streams would need equal counters.
        seed = self.config.seed * 0x9E3779B97F4A7C15 + self.progress.step * 0xBF58476D1CE4E5B9
        seed += self.rank * 0x94D049BB133111EB + micro_batch * 0xD6E8FEB86659FD93
        torch.manual_seed(seed % 2**63)

    def _clip(self) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(
            list(self.task.parameters.values()), limit if limit > 0 else float("inf")
        )

    def _skip(self, reason: str) -> None:
        progress, self.skip_reason = self.progress, reason
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            # Overflow is how the scaler finds its range: halve it, as it would itself.
            self.scaler.update(self.scaler.get_scale() / 2)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TooManySkipped(
                f"Stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row were skipped because "
                f"{reason}"
            )


class TooManySkipped(CSDiffError):
    """Training has broken down; the caller names the last good checkpoint."""
