"""The output folder of a run: whose it is, where to continue, its checkpoints and its record of numbers.

Everything appears whole or not at all. Names are absolute here; see `csdiff.training.config.absolute_places`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from csdiff.errors import CSDiffError
from csdiff.files import (
    PARTIAL,
    disk_full,
    flatten,
    folder_lock,
    move,
    plain,
    read_json,
    read_jsonl,
    remove_partial,
    write_text,
    writing_folder,
)
from csdiff.training.config import TrainConfig

CONFIG_NAME = "training.yaml"
METRICS_NAME = "metrics.jsonl"
ADAPTER_CONFIG = "config.json"
ONLINE = "online"
STATE = "state"

_STEP = re.compile(r"step-(\d+)")
# Litter of systems, and what people keep beside a run: logs, notes, scripts.
_HARMLESS = re.compile(r"\..*|Thumbs\.db|desktop\.ini|lost\+found|.*\.(log|out|err|txt|ya?ml|sh)")
# What may change between two launches of one run without making it another run.
_FREE = {"output_dir", "resume", "max_steps", "micro_batch_size", "gradient_checkpointing", "compile"}
_FREE |= {"export", "threads"}
_FREE_SECTIONS = ("logging.", "checkpoint.", "validation.")


class Checkpoints:
    """The folder `OUTPUT_DIR/checkpoints`: `step-00000100/`, ..., and the texts `latest` and `best` that name two.

    The newest `keep` are kept beside the best one; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending; what was being written when a run died is not among them."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def named(self, name: str) -> Path | None:
        """The checkpoint that `latest` or `best` names, whole or gone; None when nothing is named."""
        marker = self.folder / name
        match = _STEP.fullmatch(marker.read_text("utf-8", errors="replace").strip()) if marker.is_file() else None
        return self.folder / match[0] if match else None

    @contextmanager
    def saving(self, step: int, size: int, best: int | None) -> Iterator[Path]:
        """A checkpoint to fill, of about `size` bytes; then it and the best are named, and old ones dropped.

        Raises:
            CSDiffError: if the disk is full; nothing of the new checkpoint remains and the older ones are intact.
        """
        target = self.path(step)
        try:
            with writing_folder(target, whole=True) as aside:
                yield aside
        except Exception as error:
            if not disk_full(error):
                raise
            what = f"checkpoint {target.name} needs about {size / 1e6:.1f} MB in {self.folder}"
            raise CSDiffError(self.full_message(what)) from error
        write_text(self.folder / "latest", f"{target.name}\n")
        if best is not None and self.path(best).is_dir():
            write_text(self.folder / "best", f"{self.path(best).name}\n")
        for old in self.steps()[: -self.keep] if self.keep else ():
            if old != best:
                # Renamed first: a checkpoint that is half removed is none.
                gone = self.folder / f"{PARTIAL}{os.getpid()}-{self.path(old).name}"
                move(self.path(old), gone)
                shutil.rmtree(gone)

    def full_message(self, what: str) -> str:
        """One sentence for a full disk, given what could not be written, and where."""
        last = self.latest()
        kept = f"the last checkpoint, {last}, is intact" if last else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.folder.parent).free
        return (
            f"The disk is full: {what} and {free / 1e6:.1f} MB could be used; {kept}. Free some space and run the "
            "same command again to continue."
        )


class RunFolder:
    """Where a run lives.

    `config.json`, `*.safetensors`, `csdiff.json`, `README.md`: the finished adapter; `training.yaml`: the resolved
    configuration; `metrics.jsonl`: every logged number; `checkpoints/`; `logs/`: trackers.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.path = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.checkpoint.keep)

    def lock(self) -> AbstractContextManager[None]:
        """Keeps a second run out of an existing folder."""
        return folder_lock(self.path, "a training run")

    def start_from(self) -> Path | None:
        """The checkpoint to continue from, or None for a new run; CSDiffError for another run or no checkpoint."""
        writable = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not writable.is_dir() or not os.access(writable, os.W_OK):
            raise CSDiffError(f"--output_dir {self.path} cannot be written: {writable} is not a folder to write into.")
        self._check_ours()
        resume = self.config.resume
        if resume == "never" or (resume == "auto" and not self._used()):
            return None
        if resume == "auto":
            self._check_same_run()
            return self.checkpoints.latest()
        for candidate in (Path(resume), Checkpoints(Path(resume) / "checkpoints").latest()):
            if candidate is not None and (candidate / STATE / "state.json").is_file():
                return candidate
        raise CSDiffError(
            f"--resume {resume}: expected auto, never, or a checkpoint folder, found no {STATE}/state.json there."
        )

    def _check_ours(self) -> None:
        """Refuse a folder of anything but a run or an adapter, whose files would be mixed with those of a run."""
        if not self.path.is_dir() or (self.path / CONFIG_NAME).is_file():
            return
        with suppress(CSDiffError):
            if read_json(self.path / "csdiff.json").get("kind") == "adapter":
                return
        # What a run leaves that ended before its first step: embeddings, and what it had set aside.
        names, store = sorted(path.name for path in self.path.iterdir()), Path(self.config.data.store or "store")
        inside = store.relative_to(self.path).parts[:1] if store.is_relative_to(self.path) else ("store",)
        ours = inside or ("train", "validation", "unpaired_text", "unpaired_image")
        others = [name for name in names if name not in ours and not _HARMLESS.fullmatch(name)]
        if others and not any(re.fullmatch(r"previous-\d+", name) for name in names):
            raise CSDiffError(
                f"--output_dir {self.path}: expected a new or empty folder, or that of a run, found other files "
                f"({', '.join(others[:3])}{', ...' * (len(others) > 3)}): give another."
            )

    def _used(self) -> bool:
        return self.checkpoints.latest() is not None or (self.path / ADAPTER_CONFIG).exists()

    def _check_same_run(self) -> None:
        hint = "give another --output_dir, or --resume never to set it aside and start anew"
        saved, mine = self.saved_options(), flatten(asdict(self.config))
        if not saved:
            raise CSDiffError(f"--output_dir {self.path} holds an adapter but no {CONFIG_NAME} of a run: {hint}.")
        # An option that the earlier launch did not know had its default.
        default = flatten(asdict(TrainConfig()))
        differences = []
        for key in sorted(saved.keys() | mine.keys()):
            was, now = (options.get(key, default.get(key, "unset")) for options in (saved, mine))
            if was != now and key not in _FREE and not key.startswith(_FREE_SECTIONS):
                differences.append(f"{key} was {was!r}, is {now!r}")
        if differences:
            raise CSDiffError(
                f"--output_dir {self.path} holds a run with another configuration ({'; '.join(differences)}): {hint}."
            )

    def saved_options(self) -> dict:
        """The options of the run that is there, by dotted name; empty without one."""
        path = self.path / CONFIG_NAME
        if not path.is_file():
            return {}
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError):
            content = None
        if not isinstance(content, dict):
            raise CSDiffError(f"{path} is no configuration of a run: restore it, or give another --output_dir.")
        return flatten(content)

    def open(self, start: Path | None, step: int) -> None:
        """Make the folder ready to go on after `step`; it exists, and is locked."""
        if start is not None and start.parent == self.checkpoints.folder:
            self._set_aside([self.checkpoints.path(other) for other in self.checkpoints.steps() if other > step])
        elif self._used():
            self._set_aside(list(self.path.iterdir()))
        for folder in (self.path, self.checkpoints.folder, self.path / ONLINE):
            remove_partial(folder)
        write_text(self.path / CONFIG_NAME, yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True))
        metrics = self.path / METRICS_NAME
        kept = [json.dumps(row) + "\n" for row in read_jsonl(metrics) if self._stays(row, step)]
        if metrics.is_file():
            write_text(metrics, "".join(kept))

    def _stays(self, row: dict, step: int) -> bool:
        # Whether it is not written again after going on at `step`: a finished run measures once more.
        again = row.get("kind") == "validation" and step == self.config.max_steps
        return row.get("step", step) < step + (not again)

    def _set_aside(self, paths: list[Path]) -> None:
        if not paths:
            return
        number = 1
        while (aside := self.path / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in paths:
            # Embeddings made for the earlier run serve the new one; they carry their own fingerprint.
            if not path.name.startswith("previous-") and path.name not in ("store", ".lock"):
                path.rename(aside / path.name)

    def log(self, step: int, kind: str, numbers: dict) -> None:
        """Append one line to `metrics.jsonl`; null stands for numbers that are not finite."""
        with (self.path / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain({"step": step, "kind": kind, **numbers})) + "\n")
