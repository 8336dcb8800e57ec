"""The course of a run: steps, validations, checkpoints, the finished adapter, and what is said about them."""

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image

from csdiff.errors import CSDiffError
from csdiff.files import flatten, read_json
from csdiff.training.config import TrainConfig
from csdiff.training.console import Console
from csdiff.training.data import open_data
from csdiff.training.inputs import open_inputs
from csdiff.training.model import build_embedder, make_objective
from csdiff.training.run_folder import ONLINE, RunFolder
from csdiff.training.snapshots import Snapshots, Validator, check_decoder
from csdiff.training.task import AlignmentTask

_BASELINE_ROWS = 20_000


class Run:
    """A run with all its parts, at its first step or at that of the checkpoint `start`; making it writes nothing.

    Raises:
        CSDiffError: whatever is wrong with options, data and checkpoint: the last chance to refuse something.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, accelerator: Accelerator, start: Path | None):
        self.config, self.folder, self.accelerator, self.start = config, folder, accelerator, start
        self.main, device = accelerator.is_main_process, accelerator.device
        self.console, self.interrupt = Console(self.main, config.logging.progress), Interrupt()
        with warnings.catch_warnings():
            # Said as notes, once, rather than with the line of code that they come from.
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *place: self.console.say(f"Note: {message}")
            self.data = data = open_data(config, str(device))
            if config.export == "best" and data.validation is None:
                raise CSDiffError("--export best: no rows are held out to tell it: set --data.validation_fraction.")
            self.inputs = inputs = open_inputs(config, data, device)
            embedder = build_embedder(config, data, inputs).to(device)
        group = dist.group.WORLD if accelerator.num_processes > 1 else None
        self.task = AlignmentTask(embedder, make_objective(config, group).to(device).train(), config, group)
        if config.compile:
            embedder.compile()
        if start is not None:
            self.task.load(start)
            self._check_progress(start)
        self.progress = self.task.progress
        self.snapshots = Snapshots(config, data, self.task, inputs)
        self.validator: Validator | None = None
        self.metrics: dict = {}
        self.measured_at: int | None = None
        if self.main and config.validation.decoder is not None:
            check_decoder(config.validation.decoder, data.store)
        if self.main and data.validation is not None:
            self.validator = Validator(inputs.read(data.validation.sample(config.validation.limit)), config.validation)
            if not self.progress.baselines:
                train = data.train.sample(_BASELINE_ROWS).read(slice(None))
                self.progress.baselines = self.validator.baselines(train)
            for metrics in self.progress.baselines.values():
                self.validator.value(metrics)

    def _check_progress(self, start: Path) -> None:
        config, progress, checkpoints = self.config, self.task.progress, self.folder.checkpoints
        if progress.step > config.max_steps:
            raise CSDiffError(f"--max_steps {config.max_steps}: {start} has {progress.step} steps already; give more.")
        best = progress.best_step
        if best is not None and not checkpoints.path(best).is_dir():
            if config.export == "best" and progress.step == config.max_steps:
                raise CSDiffError(f"--export best: {checkpoints.path(best)} is gone: use --export last.")
            # Of another run, or deleted: this one has to find its own.
            progress.best_step = progress.best_value = None

    def announce(self) -> None:
        """Say what is trained, on what, with what."""
        config, train, accelerator = self.config, self.data.train, self.accelerator
        weights = sum(p.numel() for p in self.task.parameters.values())
        images = "" if train.groups is None else f" of {train.epoch_rows:,} images, one caption of each an epoch"
        unpaired = [f", {len(rows):,} {name} rows" for name, rows in self.data.groups.items() if name != "pairs"]
        held_out = len(self.data.validation or ())
        epochs = config.max_steps * config.batch_size / train.epoch_rows
        self.console.say(
            f"Training {config.adapter} ({weights:,} weights) with {config.objective} on {len(train):,} pairs{images}"
            f"{''.join(unpaired)}, {held_out:,} held out ({self.data.store.path}).\n"
            f"{config.max_steps:,} steps of {config.batch_size:,} pairs ({epochs:.1f} epochs), processes: "
            f"{accelerator.num_processes} on {accelerator.device.type}; output in {self.folder.path}."
        )
        if self.progress.step == config.max_steps:
            self.console.say(f"Nothing is left to train: {self.start} is the last step.")
        elif self.start is not None:
            self.console.say(f"Continuing from {self.start} at step {self.progress.step}.")

    def go(self) -> None:
        """Train to the end; SystemExit after SIGTERM or SIGINT, CSDiffError when training breaks down."""
        config, progress, interrupt, agree = self.config, self.progress, self.interrupt, self.task.agree
        self.console.start(progress.step, config.max_steps)
        earlier, began = progress.seconds, time.perf_counter()
        logged_at, logged_step = began, progress.step
        place = self.accelerator.process_index, self.accelerator.num_processes, progress.step
        feed = self.inputs.feed(self.data.groups, self.data.batch_sizes, config.seed, place)
        try:
            with interrupt.watched():
                if progress.validation_left:
                    better, stop = self._validate(), not agree(interrupt.signal is None)
                    if better or stop:
                        self._save()
                    if stop:
                        self._stop()
                while progress.step < config.max_steps:
                    numbers = self._step(next(feed))
                    now = time.perf_counter()
                    progress.seconds = earlier + now - began
                    shown = None
                    if self._due(config.logging.every) and numbers is not None:
                        rate = config.batch_size * (progress.step - logged_step) / max(now - logged_at, 1e-9)
                        logged_at, logged_step = now, progress.step
                        shown = {name: float(value) for name, value in numbers.items()} | {"samples_per_second": rate}
                        self._log("train", shown)
                    self.console.advance(shown)
                    better = self._due(config.validation.every) and self._validate()
                    stop = not agree(interrupt.signal is None)
                    last = progress.step == config.max_steps
                    # While steps are skipped, what comes to the disk may be broken, and would push out what is not.
                    sound = progress.skipped_in_a_row == 0
                    if better or stop or last or (sound and self._due(config.checkpoint.every)):
                        self._save()
                    if stop and (not last or not agree(not progress.validation_left)):
                        self._stop()
        finally:
            self.console.stop()
            feed.close()
        if self.measured_at != progress.step:
            self._validate()

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.config.max_steps or (every > 0 and step % every == 0)

    def _step(self, batch: dict) -> dict | None:
        progress = self.progress
        numbers, reason = self.task.step(batch)
        if reason is None:
            return numbers
        if progress.skipped_in_a_row >= self.config.max_skipped_steps:
            last = self.folder.checkpoints.latest()
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise CSDiffError(
                f"Stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row were skipped because "
                f"{reason}; {good}. Lower --learning_rate, or look for damaged rows in the data."
            )
        self.console.say(f"Step {progress.step} skipped: {reason} ({progress.skipped} so far).")
        self._log("skipped", {"reason": reason, "skipped": progress.skipped})
        return None

    def _log(self, kind: str, numbers: dict) -> None:
        if self.main:
            self.folder.log(self.progress.step, kind, numbers)
        flat = {f"{kind}/{k}": v for k, v in flatten(numbers).items() if isinstance(v, (int, float))}
        self.accelerator.log(flat, step=self.progress.step)

    def _validate(self) -> bool:
        """Draw and measure, unless a signal comes first; whether the averaged weights are the best so far."""
        progress, step, validator = self.progress, self.progress.step, self.validator
        done = self.interrupt.attempt(self._draw_and_measure)
        progress.validation_left = done is None
        if done is None:
            return False
        pictures, measured = done
        images = {str(i): np.asarray(Image.open(file).convert("RGB"))[None] for i, file in enumerate(pictures)}
        for tracker in self.accelerator.trackers if images else ():
            if tracker.name == "tensorboard":
                tracker.log_images(images, step=step, dataformats="NHWC")
        if validator is None:
            return False
        self.metrics, self.measured_at = measured["average"], step
        self._log("validation", {**measured, "baselines": progress.baselines})
        value = validator.value(self.metrics)
        shown = "not finite" if value is None else f"{value:.4f}"
        self.console.say(f"step {step}: {validator.metric} {shown} on {len(validator.image):,} held-out rows")
        better = validator.better(value, progress.best_value)
        if better:
            progress.best_step, progress.best_value = step, value
        return better

    def _draw_and_measure(self) -> tuple[list[Path], dict]:
        """Pictures of the prompts, and metrics of the averaged and the online weights, where there are such."""
        pictures, measured, step = [], {}, self.progress.step
        if self.main and self.config.validation.decoder is not None:
            pictures = self.snapshots.draw(step)
        if self.validator is not None:
            for name in ("average", "online"):
                averaged = name == "average"
                measured[name] = self.validator.measure(self.snapshots.take(step, averaged), self.task.autocast)
        return pictures, measured

    def _save(self) -> None:
        if not self.main:
            return
        step, size, best = self.progress.step, self.task.checkpoint_bytes(), self.progress.best_step
        with self.folder.checkpoints.saving(step, size, best) as folder:
            self.snapshots.write(folder, step, self.metrics if self.measured_at == step else {})
            self.task.save(folder)

    def _stop(self) -> None:
        number, step = self.interrupt.signal, self.progress.step
        name = signal.Signals(number).name if number else "a signal to another process"
        where = self.folder.checkpoints.path(step)
        self.console.stop()
        self.console.say(f"Stopped by {name} after step {step}; {where} is written, run the same command to continue.")
        raise SystemExit(128 + (number or signal.SIGTERM))

    def finish(self) -> dict:
        """Export the adapter to the output folder and show how it did; returns its held-out metrics."""
        progress, say = self.progress, self.console.say
        if not self.main:
            return self.metrics
        step, metrics = progress.step, self.metrics
        if self.config.export == "best" and progress.best_step is None:
            say("No validation gave a finite value that tells the best checkpoint: the last step is exported.")
        elif self.config.export == "best" and progress.best_step != step:
            step = progress.best_step
            best = self.folder.checkpoints.path(step)
            self.task.load(best)
            metrics = read_json(best / "csdiff.json").get("metrics") or {}
        self.snapshots.write(self.folder.path, step, metrics)
        self.snapshots.write(self.folder.path / ONLINE, step, metrics, averaged=False)
        if metrics:
            self.console.table(f"step {step}, held out", {**progress.baselines, "adapter": metrics})
        notes = [f"{self.config.batch_size * progress.step / max(progress.seconds, 1e-9):,.0f} samples/s"]
        if progress.best_step:
            notes.append(f"best {self.validator.metric} {progress.best_value:.4f} at step {progress.best_step}")
        if progress.skipped:
            notes.append(f"{progress.skipped} steps skipped")
        say(f"Trained for {timedelta(seconds=round(progress.seconds))} ({', '.join(notes)}).")
        best_is_better = metrics and self.validator.better(progress.best_value, self.validator.value(metrics))
        if step == progress.step and best_is_better:
            say(f"To export step {progress.best_step} instead, run the same command with --export best.")
        say(f"Adapter: {self.folder.path} (step {step})")
        return metrics


class _Stopped(BaseException):
    """Ends work that may be left undone; not an `Exception`, which libraries catch."""


class Interrupt:
    """SIGTERM or SIGINT as a wish to stop after the step at hand; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}
        self._attempting = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listen within a block. Outside the main thread signals cannot be handled and keep their meaning."""
        with suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._restore()

    def attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; None when a signal came before, or ended it anywhere: `work` must not change the run."""
        try:
            self._attempting = True
            try:
                return work() if self.signal is None else None
            finally:
                self._attempting = False
        except _Stopped:
            return None

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()
        if self._attempting:
            raise _Stopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
