"""The output folder of a run: whose it is, where to continue, and its record of numbers."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from csdiff.errors import CSDiffError
from csdiff.training.checkpoint import Checkpoints, write_file
from csdiff.training.config import TrainConfig

CONFIG_NAME = "training.yaml"
METRICS_NAME = "metrics.jsonl"
ADAPTER_CONFIG = "config.json"

# What may change between two launches of one run without making it another run.
_FREE = ("output_dir", "resume", "max_steps", "micro_batch_size", "gradient_checkpointing", "compile", "export")
_FREE_SECTIONS = ("logging.", "checkpoint.", "validation.")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict to dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class RunFolder:
    """Where a run lives.

    `config.json`, `*.safetensors`, `csdiff.json`, `README.md`: the finished adapter; `training.yaml`: the resolved
    configuration; `metrics.jsonl`: every logged number; `checkpoints/`; `logs/`: trackers.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.path = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.checkpoint.keep)

    def start_from(self) -> Path | None:
        """The checkpoint to continue from, or None for a new run. Reads only.

        Raises:
            CSDiffError: if the folder holds a run with another configuration, or `--resume` names no checkpoint.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CSDiffError(f"--output_dir {self.path} is a file, expected a folder: give another --output_dir.")
        writable = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not writable.is_dir() or not os.access(writable, os.W_OK):
            raise CSDiffError(f"--output_dir {self.path} cannot be written: {writable} is not a folder to write into.")
        if self.config.resume == "never":
            return None
        if self.config.resume != "auto":
            return self._given(Path(self.config.resume))
        latest = self.checkpoints.latest()
        if latest is None and not (self.path / ADAPTER_CONFIG).exists():
            return None
        self._check_same_run()
        return latest

    def _given(self, path: Path) -> Path:
        for candidate in (path, path / "checkpoints" / "latest"):
            if (candidate / "state" / "state.json").is_file():
                return candidate.resolve()
        raise CSDiffError(
            f"--resume {path}: expected auto, never, or a checkpoint folder such as {self.checkpoints.path(500)}, "
            "found no state/state.json there."
        )

    def _check_same_run(self) -> None:
        saved_path = self.path / CONFIG_NAME
        hint = "give another --output_dir, or --resume never to set what is there aside and start anew"
        if not saved_path.is_file():
            raise CSDiffError(f"--output_dir {self.path} holds an adapter but no {CONFIG_NAME} of a run: {hint}.")
        saved = flatten(yaml.safe_load(saved_path.read_text(encoding="utf-8")))
        mine = flatten(asdict(self.config))
        absent = object()
        differences = [
            f"{key} was {saved.get(key, 'unset')!r}, is {mine.get(key, 'unset')!r}"
            for key in sorted(saved.keys() | mine.keys())
            if saved.get(key, absent) != mine.get(key, absent)
            and key not in _FREE
            and not key.startswith(_FREE_SECTIONS)
        ]
        if differences:
            raise CSDiffError(
                f"--output_dir {self.path} holds a run with another configuration ({'; '.join(differences)}): {hint}."
            )

    def open(self, start: Path | None, step: int) -> None:
        """Create the folder, or make an existing one ready to go on after `step`."""
        own = start is not None and start.parent == self.checkpoints.folder.resolve()
        if own:
            later = [self.checkpoints.path(other) for other in self.checkpoints.steps() if other > step]
        else:
            later = list(self.path.iterdir()) if self._occupied() else []
        if later:
            self._set_aside(later)
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        for leftover in self.path.glob(".partial-*"):
            leftover.unlink()
        write_file(self.path / CONFIG_NAME, yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True))
        self._forget_after(step)

    def _occupied(self) -> bool:
        return self.checkpoints.latest() is not None or (self.path / ADAPTER_CONFIG).exists()

    def _set_aside(self, paths: list[Path]) -> None:
        number = 1
        while (aside := self.path / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in paths:
            # Embeddings made for the earlier run serve the new one; they carry their own fingerprint.
            if not path.name.startswith("previous-") and path.name != "store":
                path.rename(aside / path.name)

    def _forget_after(self, step: int) -> None:
        """Drop metrics of steps that a killed run had logged beyond its last checkpoint."""
        path = self.path / METRICS_NAME
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue  # The last line of a killed run may be cut short.
        write_file(path, "".join(f"{line}\n" for line in kept))

    def log(self, step: int, kind: str, numbers: dict) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.path / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **_finite(numbers)}) + "\n")


def _finite(value):
    """JSON has no infinities: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
