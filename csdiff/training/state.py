"""What a run needs to go on as if it had never stopped, beside the adapter in every checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.training.loop import Progress
from csdiff.training.optimization import copy_weights
from csdiff.training.run_folder import STATE
from csdiff.training.task import AlignmentTask


def state_bytes(task: AlignmentTask) -> int:
    """About what a checkpoint takes: the adapter, and weights, averages and two moments in float32."""
    adapter = sum(t.numel() * t.element_size() for t in task.embedder.state_dict().values())
    return adapter + 4 * 4 * sum(p.numel() for p in task.parameters.values()) + 65536


def save_state(
    folder: Path,
    task: AlignmentTask,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """Write `state/` into a checkpoint folder: `weights` and `optimizer.safetensors`, `state.json`."""
    target = folder / STATE
    target.mkdir()
    weights = {f"online.{name}": p for name, p in task.parameters.items()}
    weights |= {f"ema.{name}": value for name, value in task.ema.average.items()}
    moments = {
        f"{name}/{key}": value
        for name, parameter in task.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for file, tensors in {"weights": weights, "optimizer": moments}.items():
        plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
        save_file(plain, target / f"{file}.safetensors")
    content = {"progress": asdict(progress), "scaler": scaler.state_dict() or None}
    (target / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_state(
    folder: Path, task: AlignmentTask, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Read `state/` of a checkpoint into task, optimizer and loss scaler; returns the counters.

    Raises:
        CSDiffError: if a file is missing, damaged, or of another model.
    """
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
    parts = {prefix: _part(weights, prefix) for prefix in ("online.", "ema.")}
    expected = {name: tuple(p.shape) for name, p in task.parameters.items()}
    for found in parts.values():
        odd = sorted(set(expected.items()) ^ {(name, tuple(value.shape)) for name, value in found.items()})
        if odd:
            raise CSDiffError(
                f"Checkpoint {folder} is of another model: {odd[0][0]} of shape {list(odd[0][1])} is on one side "
                "only; resume with the adapter and objective of that run."
            )
    copy_weights(parts["online."], task.parameters)
    copy_weights(parts["ema."], task.ema.average)
    names = {id(parameter): name for name, parameter in task.parameters.items()}
    packed = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {i: entries for i, name in enumerate(order) if (entries := _part(moments, f"{name}/"))}
    optimizer.load_state_dict(packed)
    if scaler.is_enabled() and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    return progress


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
