"""What is trained, one optimizer step after another, and all that a run needs to go on as if it had never stopped."""

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.training.config import TrainConfig
from csdiff.training.inputs import Rows
from csdiff.training.model import Embedder
from csdiff.training.optimization import EMA, copy_weights, learning_rate_factor, make_optimizer
from csdiff.training.run_folder import STATE

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFinite(ArithmeticError):
    """The embeddings or the loss of a batch are not finite; nothing was added to the gradients that counts."""


@dataclass
class Progress:
    """Counters of a run. Sample order, dropout and noise follow from seed and step and need no state."""

    step: int = 0  # batches seen, the skipped ones included
    skipped: int = 0  # for a non-finite loss or gradient
    skipped_in_a_row: int = 0
    best_step: int | None = None  # the checkpoint with the best validation metric, and its value
    best_value: float | None = None
    validation_left: bool = False  # a signal ended the validation of this step
    seconds: float = 0.0  # over all launches
    baselines: dict = field(default_factory=dict)  # validation metrics of the data's own baselines


class AlignmentTask:
    """Embedder, objective, optimizer and running average of the weights.

    Every random draw of a step follows from seed, step, rank and micro-batch, so that a resumed run draws what an
    uninterrupted one would have drawn. The embedder is on its device, the objective is made for the process `group`
    that shares the batch; all processes get the weights of the first.

    Raises:
        CSDiffError: nothing in the embedder can be trained.
    """

    def __init__(
        self,
        embedder: Embedder,
        objective: nn.Module,
        config: TrainConfig | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.embedder, self.objective, self.group = embedder, objective, group
        self.config = config = config or TrainConfig()
        self.rank = 0 if group is None else dist.get_rank(group)
        self.parameters = {
            **{f"embedder.{n}": p for n, p in embedder.named_parameters() if p.requires_grad},
            **{f"objective.{n}": p for n, p in objective.named_parameters() if p.requires_grad},
        }
        if not self.parameters:
            raise CSDiffError(f"--adapter {config.adapter} has no weights to train.")
        if group is not None:
            for tensor in (*self.parameters.values(), *embedder.adapter.buffers()):
                dist.broadcast(tensor.detach(), 0, group=group)
        self.ema = EMA(self.parameters, config.ema.decay)
        self.optimizer = make_optimizer(self.parameters, config)
        self.device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        # It makes its scale on first use, and the first step may be one that halves it.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.progress = Progress()

    def step(self, batch: Rows) -> tuple[dict[str, Tensor | float], str | None]:
        """One update; returns the numbers to log and, when the step was skipped, the reason."""
        config, progress = self.config, self.progress
        rate = config.learning_rate * learning_rate_factor(config.schedule, progress.step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        numbers: dict[str, Tensor | float] = {}
        try:
            output = self.backward(batch, config.micro_batch_size)
            self.average_gradients()
            self.scaler.unscale_(self.optimizer)
            limit = config.optimizer.max_grad_norm or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
            reason = None if torch.isfinite(norm) else "the gradient is not finite"
            numbers = {"loss": output.loss.detach(), **output.terms, "grad_norm": norm, "learning_rate": rate}
        except NonFinite as problem:
            reason = str(problem)
        progress.step += 1
        if reason is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.ema.update(progress.step - progress.skipped)
            progress.skipped_in_a_row = 0
        else:
            if self.scaler.is_enabled():
                # Overflow is how the scaler finds its range: halve it, as it would itself.
                self.scaler.update(self.scaler.get_scale() / 2)
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        return numbers, reason

    def backward(self, batch: Rows, micro_batch_size: int | None = None) -> Any:
        """Adds the gradient of the loss to every weight. Returns loss and terms.

        The objective couples all rows, so smaller batches would be another objective. With a `micro_batch_size` every
        micro-batch is embedded without a graph, the loss of all is differentiated at the embeddings, and every
        micro-batch is embedded again, with the same random numbers, to pass its part of that gradient on: the gradient
        of one big batch, in the memory of a micro-batch and of the embeddings.

        Source: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".

        Raises:
            NonFinite: if embeddings or loss are not finite, on any process; the gradients are then to be thrown away.
        """
        # Images without an adapter pass through no weights: they go to the loss directly.
        trained = self.embedder.image_adapter is not None
        rows = {group: part for group, part in batch.items() if group != "unpaired_image" or trained}
        parts = [rows] if micro_batch_size is None else split(rows, micro_batch_size)
        if len(parts) == 1:
            self.reseed(0)
            output = self._finite_loss(self.embed(rows), batch)
            self.scaler.scale(output.loss).backward()
            return output
        pieces: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for index, part in enumerate(parts):
                self.reseed(index)
                for name, value in self.embed(part).items():
                    pieces.setdefault(name, []).append(value)
        joined = {name: torch.cat(values).requires_grad_() for name, values in pieces.items()}
        output = self._finite_loss(joined, batch)
        self.scaler.scale(output.loss).backward()
        gradients = {}
        for name, value in joined.items():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            gradients[name] = iter(gradient.split([len(piece) for piece in pieces[name]]))
        for index, part in enumerate(parts):
            self.reseed(index)
            embedded = self.embed(part)
            torch.autograd.backward(list(embedded.values()), [next(gradients[name]) for name in embedded])
        return output

    def reseed(self, micro_batch: int) -> None:
        """Set the random state of a micro-batch of this step and process."""
        # Odd multipliers spread the counters over the seed's 64 bits; equal streams would need equal counters.
        seed = self.config.seed * 0x9E3779B97F4A7C15 + self.progress.step * 0xBF58476D1CE4E5B9
        seed += self.rank * 0x94D049BB133111EB + micro_batch * 0xD6E8FEB86659FD93
        torch.manual_seed(seed % 2**63)

    def autocast(self) -> AbstractContextManager:
        """The computation type of the embedder; the objective always computes in float32."""
        precision = self.config.mixed_precision
        return torch.autocast(self.device.type, dtype=_DTYPES[precision], enabled=precision != "no")

    def embed(self, rows: Rows) -> dict[str, Tensor]:
        with self.autocast():
            return self.embedder(rows)

    def _finite_loss(self, embedded: dict[str, Tensor], batch: Rows) -> Any:
        checked = [*embedded.values(), *(rows["image_embeds"] for rows in batch.values() if "image_embeds" in rows)]
        if not self.agree(all(bool(value.detach().isfinite().all()) for value in checked)):
            raise NonFinite("an embedding is not finite")
        output = self.loss(embedded, batch)
        if not self.agree(bool(output.loss.detach().isfinite())):
            raise NonFinite("the loss is not finite")
        return output

    def loss(self, embedded: dict[str, Tensor], batch: Rows) -> Any:
        """The objective of embedded rows and of what in the batch does not depend on the weights."""
        if "error" in embedded:
            return self.objective(embedded["error"])
        pairs = batch["pairs"]
        inputs: dict[str, Tensor | None] = {}
        if self.objective.uses_source_text:
            inputs["source_text"] = pairs["text_embeds"]
        if self.objective.uses_unpaired:
            fixed = batch.get("unpaired_image", {}).get("image_embeds")
            inputs["unpaired_text"] = embedded.get("unpaired_text")
            inputs["unpaired_image"] = embedded.get("unpaired_image", fixed)
        if "text_tokens" in embedded:
            inputs |= {name: pairs[name] for name in ("image_tokens", "text_mask")}
            inputs["text_tokens"] = embedded["text_tokens"]
        image = embedded.get("image", pairs["image_embeds"])
        try:
            with torch.autocast(self.device.type, enabled=False):
                return self.objective(embedded["prediction"], image, **inputs)
        except ValueError as error:
            raise CSDiffError(f"--objective: {type(self.objective).__name__} refuses these rows: {error}") from error

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes, in one reduction.

        The objective scales the gradients it hands back so that this mean is the gradient of the whole batch. One flat
        reduction after the last backward adds in the same order at every step, which DDP's buckets do not once they
        are rebuilt: a resumed run would differ in the last bits.
        """
        if self.group is None:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def agree(self, fine: bool) -> bool:
        """Whether something holds on every process, so that all of them take the same turn."""
        if self.group is None:
            return fine
        flag = torch.tensor(float(fine), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the adapter, and weights, averages and two moments in float32."""
        adapter = sum(t.numel() * t.element_size() for t in self.embedder.state_dict().values())
        return adapter + 4 * 4 * sum(p.numel() for p in self.parameters.values()) + 65536

    def save(self, folder: Path) -> None:
        """Write `state/` into a checkpoint folder: `weights` and `optimizer.safetensors`, `state.json`."""
        target = folder / STATE
        target.mkdir()
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        for file, tensors in {"weights": self._weights(), "optimizer": moments}.items():
            plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
            save_file(plain, target / f"{file}.safetensors")
        content = {"progress": asdict(self.progress), "scaler": self.scaler.state_dict() or None}
        (target / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read `state/` of a checkpoint into weights, optimizer and loss scaler; CSDiffError if it does not fit."""
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
            parameter = self.parameters[parameter]
            self.optimizer.state[parameter][key] = value.to(parameter.device)
        if self.scaler.is_enabled() and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.progress = progress

    def _weights(self) -> dict[str, Tensor]:
        online = {f"online.{name}": parameter for name, parameter in self.parameters.items()}
        return online | {f"ema.{name}": value for name, value in self.ema.average.items()}


def split(batch: Rows, size: int) -> list[Rows]:
    """Cut every group of rows into micro-batches of at most `size` rows."""
    parts = []
    for group, rows in batch.items():
        count = len(next(iter(rows.values())))
        for start in range(0, count, size):
            parts.append({group: {name: value[start : start + size] for name, value in rows.items()}})
    return parts
