"""Where the adapter to export comes from: the folder in a run, and the weights in it."""

from __future__ import annotations

import json
from pathlib import Path

from csdiff.adapters import AutoAdapter
from csdiff.adapters.base import Adapter
from csdiff.adapters.folder import read_header
from csdiff.errors import CSDiffError
from csdiff.export.config import ExportConfig
from csdiff.training.run_folder import CONFIG_NAME, METRICS_NAME, ONLINE, Checkpoints

_STATE = "state"
_PREFIX = "online.embedder.adapter."


def locate(config: ExportConfig) -> str | Path:
    """The adapter folder that is meant, or the hub repository as it is.

    Raises:
        CSDiffError: No such checkpoint, or a run that has left nothing yet.
    """
    if not config.source:
        raise CSDiffError("source: expected a training run, checkpoint or adapter folder, found nothing; name one.")
    folder = Path(config.source)
    is_run = (folder / CONFIG_NAME).is_file()
    if not is_run:
        if config.checkpoint is not None:
            raise CSDiffError(
                f"checkpoint: expected the output folder of a training run (with {CONFIG_NAME}) to look for "
                f"{config.checkpoint} in, found {config.source}."
            )
        return folder if folder.exists() else config.source
    if config.checkpoint is None and (folder / "config.json").is_file():
        if config.weights == "online" and not (folder / ONLINE / "config.json").is_file():
            raise CSDiffError(f"weights: expected online weights in {folder / ONLINE}, found none; use a checkpoint.")
        return folder / ONLINE if config.weights == "online" else folder
    return _checkpoint(folder, config.checkpoint or "latest")


def _checkpoint(run: Path, wanted: str) -> Path:
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps()
    if wanted in ("best", "latest"):
        found = checkpoints.latest() if wanted == "latest" else checkpoints.named(wanted)
        if found is not None and found.is_dir():
            return found
    else:
        number = wanted.removeprefix("step-")
        if not number.isdecimal():
            raise CSDiffError(f"checkpoint: expected best, latest or a step, found {wanted!r}.")
        if int(number) in steps:
            return checkpoints.path(int(number))
    there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "the run has left none yet"
    raise CSDiffError(f"checkpoint: expected {wanted} in {checkpoints.folder}, found none; {there}.")


def load(folder: str | Path, weights: str) -> Adapter:
    """The adapter with the weights asked for, and metadata that says so.

    A checkpoint holds the averaged weights as an adapter folder and the online ones in its state; statistics and norm
    calibration are those of the average.

    Raises:
        CSDiffError: A broken folder, or no online weights in it.
    """
    adapter = AutoAdapter.from_pretrained(folder)
    found = (adapter.metadata.get("training") or {}).get("weights")
    if weights == found or (found is None and weights == "average"):
        return adapter
    state = Path(folder) / _STATE / "weights.safetensors"
    if weights == "average" or not state.is_file():
        raise CSDiffError(
            f"weights: expected {weights} weights in {folder}, found {found or 'nothing said of them'}; give the "
            "training run, or one of its checkpoints."
        )
    _take_online(adapter, state)
    step = adapter.metadata["training"].get("steps")
    adapter.metadata["training"]["weights"] = "online"
    adapter.metadata["metrics"] = _online_metrics(Path(folder).resolve().parent.parent / METRICS_NAME, step)
    return adapter


def _take_online(adapter: Adapter, state: Path) -> None:
    from safetensors.torch import load_file

    read_header([state])
    found = {
        name.removeprefix(_PREFIX): tensor for name, tensor in load_file(state).items() if name.startswith(_PREFIX)
    }
    parameters = dict(adapter.named_parameters())
    odd = sorted(set(found) - set(parameters))
    if odd or not found:
        raise CSDiffError(f"{state}: expected the weights of a {type(adapter).__name__}, found {odd[:3] or 'none'}.")
    for name, tensor in found.items():
        parameters[name].data.copy_(tensor)


def _online_metrics(file: Path, step: int | None) -> dict:
    """What the run measured of the online weights at that step; nothing when it did not."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("kind") == "validation" and entry.get("step") == step:
                return entry.get("online") or {}
    return {}
