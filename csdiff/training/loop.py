"""One optimizer step after another, and all that a run needs to go on as if it had never stopped."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.training.config import TrainConfig
from csdiff.training.gradient_cache import Rows
from csdiff.training.optimization import copy_weights, learning_rate_factor, make_optimizer
from csdiff.training.run_folder import STATE
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
    """Makes the steps of a run, as process `rank` of it; `skip_reason` says why the last skipped step was skipped.

    Every random draw of a step follows from seed, step, rank and micro-batch, so that a resumed run draws what an
    uninterrupted one would have drawn.
    """

    def __init__(self, config: TrainConfig, task: AlignmentTask, rank: int = 0):
        self.config, self.task, self.rank = config, task, rank
        self.optimizer = make_optimizer(task.parameters, config)
        device = next(iter(task.parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
        self.progress, self.skip_reason = Progress(), ""

    def step(self, batch: Rows) -> dict[str, Tensor | float] | None:
        """One update; returns the numbers to log, or None when the step was skipped."""
        config, progress, task = self.config, self.progress, self.task
        rate = config.learning_rate * learning_rate_factor(config.schedule, progress.step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            output = task.backward(batch, config.micro_batch_size, scale=self.scaler.scale, reseed=self._reseed)
            task.average_gradients()
            self.scaler.unscale_(self.optimizer)
            limit = config.optimizer.max_grad_norm or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(list(task.parameters.values()), limit)
            reason = None if torch.isfinite(norm) else "the gradient is not finite"
        except NonFinite as problem:
            reason = str(problem)
        progress.step += 1
        if reason is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            task.ema.update(progress.step - progress.skipped)
            progress.skipped_in_a_row = 0
        else:
            if self.scaler.is_enabled():
                # Overflow is how the scaler finds its range: halve it, as it would itself.
                self.scaler.update(self.scaler.get_scale() / 2)
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        self.skip_reason = reason
        self.optimizer.zero_grad(set_to_none=True)
        if reason is not None:
            return None
        return {"loss": output.loss.detach(), **output.terms, "grad_norm": norm, "learning_rate": rate}

    def _reseed(self, micro_batch: int) -> None:
        # Odd multipliers spread the counters over the seed's 64 bits; equal streams would need equal counters.
        seed = self.config.seed * 0x9E3779B97F4A7C15 + self.progress.step * 0xBF58476D1CE4E5B9
        seed += self.rank * 0x94D049BB133111EB + micro_batch * 0xD6E8FEB86659FD93
        torch.manual_seed(seed % 2**63)

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the adapter, and weights, averages and two moments in float32."""
        adapter = sum(t.numel() * t.element_size() for t in self.task.embedder.state_dict().values())
        return adapter + 4 * 4 * sum(p.numel() for p in self.task.parameters.values()) + 65536

    def save(self, folder: Path) -> None:
        """Write `state/` into a checkpoint folder: `weights` and `optimizer.safetensors`, `state.json`."""
        target = folder / STATE
        target.mkdir()
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.task.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        for file, tensors in {"weights": self._weights(), "optimizer": moments}.items():
            plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
            save_file(plain, target / f"{file}.safetensors")
        content = {"progress": asdict(self.progress), "scaler": self.scaler.state_dict() or None}
        (target / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read `state/` of a checkpoint into task, optimizer and loss scaler; CSDiffError if it does not fit."""
        source = folder / STATE
        try:
            weights = load_file(source / "weights.safetensors")
            moments = load_file(source / "optimizer.safetensors")
            content = read_json(source / "state.json")
            progress = Progress(**content["progress"])
        except (OSError, SafetensorError, KeyError, TypeError, CSDiffError) as error:
            raise CSDiffError(
                f"Checkpoint {folder} cannot be read ({error}): remove it to continue from the one before, or give "
                "another with --resume."
            ) from error
        here, there = ({name: t.shape for name, t in side.items()} for side in (self._weights(), weights))
        if here != there:
            raise CSDiffError(
                f"Checkpoint {folder} is of another model: resume with adapter and objective of its run."
            )
        copy_weights(weights, self._weights())
        for name, value in moments.items():
            parameter, key = name.rsplit("/", 1)
            parameter = self.task.parameters[parameter]
            self.optimizer.state[parameter][key] = value.to(parameter.device)
        if self.scaler.is_enabled() and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.progress = progress

    def _weights(self) -> dict[str, Tensor]:
        online = {f"online.{name}": parameter for name, parameter in self.task.parameters.items()}
        return online | {f"ema.{name}": value for name, value in self.task.ema.average.items()}
