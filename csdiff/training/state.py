"""What a run needs to go on as if it had never stopped, beside the adapter in every checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.training.task import AlignmentTask

FOLDER = "state"


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


def state_bytes(task: AlignmentTask) -> int:
    """About what a checkpoint takes: the adapter, and weights, averages and two moments in float32."""
    adapter = sum(t.numel() * t.element_size() for t in task.embedder.state_dict().values())
    return adapter + 4 * 4 * sum(p.numel() for p in task.parameters.values()) + 65536


def save_state(
    folder: Path, task: AlignmentTask, optimizer: torch.optim.Optimizer, scaler: dict | None, progress: Progress
) -> None:
    """Write `state/` into a checkpoint folder."""
    target = folder / FOLDER
    target.mkdir()
    weights = {f"online.{name}": p for name, p in task.parameters.items()}
    weights |= {f"ema.{name}": value for name, value in task.ema.average.items()}
    moments = {
        f"{name}/{key}": value
        for name, parameter in task.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(_plain(weights), target / "weights.safetensors")
    save_file(_plain(moments), target / "optimizer.safetensors")
    content = {"progress": asdict(progress), "scaler": scaler}
    (target / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path, task: AlignmentTask, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict | None]:
    """Read `state/` of a checkpoint into task and optimizer; returns the counters and the loss scaler's state.

    Raises:
        CSDiffError: if a file is missing, damaged, or of another model.
    """
    source = folder / FOLDER
    try:
        weights = load_file(source / "weights.safetensors")
        moments = load_file(source / "optimizer.safetensors")
        content = json.loads((source / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CSDiffError(
            f"Checkpoint {folder} cannot be read ({error}): remove it to continue from the one before, or give "
            "another with --resume."
        ) from error
    expected = {f"online.{name}": tuple(p.shape) for name, p in task.parameters.items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if name.startswith("online.")}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))
        raise CSDiffError(
            f"Checkpoint {folder} is of another model: {odd[0][0]} of shape {list(odd[0][1])} is on one side only; "
            "resume with the adapter and objective of that run."
        )
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(weights[f"online.{name}"])
    task.ema.load({name: weights[f"ema.{name}"] for name in task.parameters})
    _load_moments(optimizer, task.parameters, moments)
    return Progress(**content["progress"]), content["scaler"]


def _load_moments(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    packed = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {}
    for index, name in enumerate(order):
        entries = {key.rpartition("/")[2]: v for key, v in moments.items() if key.rpartition("/")[0] == name}
        if entries:
            packed["state"][index] = entries
    optimizer.load_state_dict(packed)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
