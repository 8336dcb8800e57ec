"""A training run from start to finish: `train(config)`."""

import os
import re
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from csdiff.devices import threads
from csdiff.errors import CSDiffError
from csdiff.files import disk_full, flatten
from csdiff.options import check_options
from csdiff.training.config import TrainConfig, absolute_places
from csdiff.training.model import check_names
from csdiff.training.run import Run
from csdiff.training.run_folder import RunFolder

# The other processes wait while the main one validates, draws and saves.
_PATIENCE = timedelta(hours=6)


@dataclass
class TrainResult:
    """What a run leaves: the folder of the finished adapter, and its held-out metrics."""

    adapter_dir: Path
    metrics: dict


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter, or continue to; the output folder becomes an adapter folder with checkpoints and metrics.

    Raises:
        CSDiffError: on bad input, before anything is written; when another run is under way in the folder; on a full
            disk; when another process has gone; when training has broken down.
        SystemExit: with 128 + signal after SIGTERM or SIGINT, once a checkpoint is written.
    """
    check_options(config)
    if not config.data.train:
        raise CSDiffError(
            "--data.train is missing: give an embedding store or a captioned dataset, for example "
            "--data.train runs/my-store (`csdiff embed` makes one)."
        )
    config = absolute_places(config)
    check_names(config)
    folder = RunFolder(config)
    with ExitStack() as stack:
        if folder.path.is_dir() and os.environ.get("RANK", "0") == "0":
            stack.enter_context(folder.lock())
        start = folder.start_from()
        config.threads = _threads(config, folder)
        stack.enter_context(threads(config.threads))
        try:
            return _train(config, folder, start, stack)
        except CSDiffError:
            raise
        except Exception as error:
            if disk_full(error):
                what = f"nothing can be added to {folder.path}"
                raise CSDiffError(folder.checkpoints.full_message(what)) from error
            if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ncclComm")):
                reason = " ".join(str(error).split())[:200]
                raise CSDiffError(
                    f"Another process of this run has died or cannot be reached ({reason}): see what it said, and "
                    "start all of them again to continue."
                ) from error
            raise


def _train(config: TrainConfig, folder: RunFolder, start: Path | None, stack: ExitStack) -> TrainResult:
    accelerator = _accelerator(config, folder)
    if config.batch_size < accelerator.num_processes:
        raise CSDiffError(f"--batch_size {config.batch_size}: expected a row for each process, raise it.")
    if accelerator.is_main_process:
        _say_how_many(accelerator.num_processes)
    run = Run(config, folder, accelerator, start)
    if accelerator.is_main_process:
        if not folder.path.is_dir():
            folder.path.mkdir(parents=True)
            stack.enter_context(folder.lock())
        folder.open(start, run.progress.step)
    accelerator.wait_for_everyone()
    options = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flatten(asdict(config)).items()}
    accelerator.init_trackers(config.logging.project, config=options)
    try:
        run.announce()
        run.go()
        return TrainResult(folder.path, run.finish())
    finally:
        accelerator.end_training()


def _threads(config: TrainConfig, folder: RunFolder) -> int:
    """Those that the run was started with, or that are configured; at first all cores, shared among processes.

    Launchers set OMP_NUM_THREADS each in their own way, and sums depend on it in the last bits.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fresh = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return config.threads or folder.saved_options().get("threads") or fresh


def _say_how_many(found: int) -> None:
    """`accelerate launch --cpu --num_processes N` starts one process, and leaves a trace in its command line only."""
    with suppress(psutil.Error):
        command = " ".join(psutil.Process(os.getppid()).cmdline())
        asked = re.search(r"\blaunch\b.* --num[_-]processes[= ](\d+)", command)
        if asked and int(asked[1]) > found:
            print(
                f"WARNING: the launcher was asked for {asked[1]} processes and started {found}: on processors start "
                f"them with torchrun --standalone --nproc_per_node {asked[1]} train_adapter.py ...",
                flush=True,
            )


def _accelerator(config: TrainConfig, folder: RunFolder) -> Accelerator:
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise CSDiffError(
                f"accelerate is configured for {engine}, which splits weights; adapters are replicas: use --multi_gpu."
            )
    trackers = [name for name in config.logging.trackers if name != "none"]
    # Accelerate leaves out in silence what is not installed.
    ready = {str(tracker) for tracker in get_available_trackers()}
    absent = [name for name in trackers if name in LOGGER_TYPE_TO_CLASS and name not in ready]
    if absent:
        raise CSDiffError(
            f"--logging.trackers {absent[0]}: its package is not installed: install it, or use one of those that are "
            f"({', '.join(sorted(ready)) or 'none'})."
        )
    try:
        return Accelerator(
            # Without this, Accelerate runs every launched process on its own where there is no accelerator.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=folder.path / "logs",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:
        raise CSDiffError(f"--logging.trackers {config.logging.trackers}: {error}") from error
