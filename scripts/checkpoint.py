"""Resumable state of the asset training scripts: tensors in safetensors, the step in JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


class EMAState(nn.Module):
    """`EMAModel` as a module, so that one function saves everything."""

    def __init__(self, ema: EMAModel) -> None:
        super().__init__()
        self.shadow = nn.ParameterList([nn.Parameter(p, requires_grad=False) for p in ema.shadow_params])
        ema.shadow_params = list(self.shadow)


def flatten(prefix: str, value, tensors: dict, scalars: dict) -> None:
    """Split nested dicts and lists into flat tensors and JSON scalars keyed by path."""
    if isinstance(value, torch.Tensor):
        tensors[prefix] = value.detach().clone().contiguous()
    elif isinstance(value, dict):
        for key, item in value.items():
            flatten(f"{prefix}/{key}", item, tensors, scalars)
    else:
        scalars[prefix] = value


def save(folder: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write `modules`, the optimizer's moments and `step` to `folder`; a reader never sees half a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, scalars = {}, {"step": step}
    for name, module in modules.items():
        flatten(name, module.state_dict(), tensors, scalars)
    flatten("optimizer", optimizer.state_dict()["state"], tensors, scalars)
    written = folder / "state.safetensors.tmp"
    save_file(tensors, written, metadata={"scalars": json.dumps(scalars)})
    written.replace(folder / "state.safetensors")


def load(folder: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save` wrote; returns the step, 0 when there is nothing to restore."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as handle:
        scalars = json.loads(handle.metadata()["scalars"])
    tensors = load_file(path)
    for name, module in modules.items():
        start = f"{name}/"
        module.load_state_dict({k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)})
    state: dict[int, dict] = {}
    for key, value in {**tensors, **scalars}.items():
        if key.startswith("optimizer/"):
            _, index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
    full = optimizer.state_dict()
    full["state"] = state
    optimizer.load_state_dict(full)
    return scalars["step"]
