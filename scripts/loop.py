"""The one training loop of the shipped models: what the training scripts share.

A script gives the modules, a function that computes its named losses on a random batch, and their weights. The loop
does the rest: bf16 autocast and one CUDA graph a step where there is a GPU, AdamW without decay on vectors, a learning
rate by steps, an average of the weights, and a checkpoint from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from images import BUILD
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from csdiff.devices import choose_device

DEVICE = choose_device("auto")
WARM_UP = 200


def parse_arguments(description: str, output: str, **defaults) -> argparse.Namespace:
    """Command line of a training script: `output` below the build folder, and an option for every default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUILD / output, help="folder of checkpoint and result")
    parser.add_argument("--further", type=Path, default=BUILD / "further.parquet", help="images that do not ship")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="use each EVERY-th image and phrase, for a quick look")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def autocast() -> torch.autocast:
    """bfloat16 on a GPU; on a CPU, where it is slower, none."""
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda")


def indices(count: int, batch: int) -> Tensor:
    """`batch` random row numbers below `count`."""
    return torch.randint(count, (batch,), device=DEVICE)


class Loop:
    """Trains `modules` on `losses() -> {name: scalar}`, summed with `weights` (1 where a name has none).

    Args:
        modules: what is trained and saved, by name; parameters without gradient stay as they are.
        losses: draws a batch and computes the losses; all randomness from torch's default generator of the device,
            no value read back, shapes the same every time, so that it can be a CUDA graph.
        output: the checkpoint is `output/checkpoint.safetensors`.
        steps: of the whole run.
        learning_rate: after `WARM_UP` steps; falls to 2% of itself over the part `decay` of the run, as a cosine.
        ema: decay of the average of the weights, shorter at first.
        weights: of the losses.
        last_losses: takes the place of `losses` where the learning rate falls.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        losses: Callable[[], dict[str, Tensor]],
        output: Path,
        *,
        steps: int,
        learning_rate: float,
        decay: float,
        weight_decay: float,
        betas: tuple[float, float],
        ema: float = 0.999,
        weights: dict[str, float] | None = None,
        last_losses: Callable[[], dict[str, Tensor]] | None = None,
        seed: int = 0,
        save_every: int = 250,
    ) -> None:
        self.modules, self.losses, self.last_losses = modules, losses, last_losses or losses
        self.path = output / "checkpoint.safetensors"
        self.steps, self.learning_rate, self.decay, self.ema = steps, learning_rate, decay, ema
        self.weights, self.seed, self.save_every = weights or {}, seed, save_every
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.rate = torch.zeros((), device=DEVICE)
        on_gpu = DEVICE.type == "cuda"
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=betas, fused=on_gpu, capturable=on_gpu)

    def run(self, report: Callable[[], dict] | None = None, report_every: int = 500) -> None:
        """Train to the last step, from the checkpoint where there is one, and leave the average in the modules."""
        first_part, last_part, seen = self._prepare()
        step = self._load()
        started, first = time.time(), step
        while step < self.steps:
            torch.manual_seed(self.seed * 1_000_003 + step)
            self.rate.fill_(self.learning_rate * self._schedule(step))
            (first_part if step < (1 - self.decay) * self.steps else last_part)()
            step += 1
            current = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.average, current, 1 - min(self.ema, step / (step + 20)))
            if step % 50 == 0 or step == self.steps:
                shown = "  ".join(f"{name} {value:.4f}" for name, value in seen.items())
                seconds = (time.time() - started) / (step - first)
                print(f"step {step}/{self.steps}  {shown}  {seconds:.2f} s a step", flush=True)
            if step % self.save_every == 0 or step == self.steps:
                self._save(step)
            if report is not None and step % report_every == 0:
                print(json.dumps(report()), flush=True)
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)
        for module in self.modules.values():
            module.eval().requires_grad_(False)

    def _schedule(self, step: int) -> float:
        start = (1 - self.decay) * self.steps
        fallen = max(0.0, (step - start) / (self.steps - start))
        return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * fallen)))

    def _prepare(self) -> tuple[Callable[[], None], Callable[[], None], dict[str, Tensor]]:
        """A step of the first and of the last part of the run, and the place where they leave their losses."""
        seen: dict[str, Tensor] = {}
        # A step at rate 0 makes the optimizer's state; what else it changed (moments, running means) is put back.
        before = {name: tensor.clone() for name, tensor in self._tensors().items()}
        first = self._compiled(self.losses, seen)
        last = first if self.last_losses is self.losses else self._compiled(self.last_losses, seen)
        for name, tensor in self._tensors().items():
            if name in before:
                tensor.copy_(before[name])
            else:
                tensor.zero_()
        return first, last, seen

    def _compiled(self, losses: Callable[[], dict[str, Tensor]], seen: dict[str, Tensor]) -> Callable[[], None]:
        """One step as a function, run once; on a GPU the replay of its CUDA graph."""

        def one_step() -> None:
            with autocast():
                found = losses()
            self.optimizer.zero_grad(set_to_none=False)
            sum(self.weights.get(name, 1.0) * value for name, value in found.items()).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            for name, value in found.items():
                seen.setdefault(name, torch.zeros((), device=DEVICE)).copy_(value.detach())

        if DEVICE.type != "cuda":
            one_step()
            return one_step
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                one_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one_step()
        return graph.replay

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a run needs to go on, by name, as the tensors in use."""
        tensors = {f"average/{i}": average for i, average in enumerate(self.average)}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
        return tensors

    def _save(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".tmp")
        tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._tensors().items()
        }
        save_file(tensors, written, metadata={"step": str(step)})
        written.replace(self.path)

    @torch.no_grad()
    def _load(self) -> int:
        """Put the checkpoint into the tensors in use; returns its step, 0 without one."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, "pt", device=str(DEVICE)) as checkpoint:
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.get_tensor(name))
            return int(checkpoint.metadata()["step"])
