"""What is in the output folder of a training run, and in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from csdiff.info.adapters import describe_adapter, is_adapter
from csdiff.info.files import header, read_json
from csdiff.training.run_folder import CONFIG_NAME, METRICS_NAME, Checkpoints


def is_run(folder: Path) -> bool:
    """Whether a training run has written its configuration there."""
    return (folder / CONFIG_NAME).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the state that training goes on from."""
    return (folder / "state").is_dir()


def describe_run(folder: Path, problems: list[str], check: bool) -> dict:
    """Progress, checkpoints, and the adapter: the finished one, else that of the newest checkpoint."""
    config = _config(folder, problems)
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    finished = is_adapter(folder)
    newest = checkpoints.latest()
    facts = {
        "finished": finished,
        "steps": steps[-1] if steps else 0,
        "max_steps": config.get("max_steps"),
        "train": (config.get("data") or {}).get("train"),
        "checkpoints": steps,
    }
    if newest is not None:
        facts["progress"] = progress(newest, problems)
        for name in ("best", "latest"):
            if (named := checkpoints.named(name)) is not None:
                facts[name] = named.name
                if not named.is_dir():
                    problems.append(f"{checkpoints.folder / name} names {facts[name]}, which is missing")
    where = folder if finished else newest
    if where is None:
        problems.append(f"{folder}: the run has left no checkpoint yet; the same command starts it anew")
    else:
        facts |= describe_adapter(where, problems, check)
    if not facts.get("metrics"):
        facts["last_validation"] = _last_validation(folder / METRICS_NAME)
    for step in steps if check else ():
        _check_state(checkpoints.path(step), problems)
    return facts


def describe_checkpoint(folder: Path, problems: list[str], check: bool) -> dict:
    """The counters of a checkpoint and its adapter."""
    if check:
        _check_state(folder, problems)
    return {"progress": progress(folder, problems), **describe_adapter(folder, problems, check)}


def progress(checkpoint: Path, problems: list[str]) -> dict:
    """The counters of a checkpoint, without the metrics of the baselines."""
    content = read_json(checkpoint / "state" / "state.json", problems).get("progress") or {}
    return {key: value for key, value in content.items() if key != "baselines"}


def _config(folder: Path, problems: list[str]) -> dict:
    try:
        content = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{folder / CONFIG_NAME} is not YAML ({error})")
        return {}
    return content if isinstance(content, dict) else {}


def _last_validation(file: Path) -> dict | None:
    """The last validation of the averaged weights, with its step."""
    if not file.is_file():
        return None
    found = None
    for line in file.read_text(encoding="utf-8").splitlines():
        # the last line of a killed run may be cut short
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("kind") == "validation":
            found = {"step": entry["step"], **(entry.get("average") or {})}
    return found


def _check_state(checkpoint: Path, problems: list[str]) -> None:
    for name in ("weights.safetensors", "optimizer.safetensors"):
        header(checkpoint / "state" / name, problems)
