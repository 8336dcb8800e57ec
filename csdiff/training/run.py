"""The course of a run: steps, validations, checkpoints, the finished adapter, and what is said about them."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from csdiff.errors import CSDiffError
from csdiff.files import flatten, read_json
from csdiff.training.config import TrainConfig
from csdiff.training.console import Console, duration
from csdiff.training.data import TrainingData
from csdiff.training.export import Exporter
from csdiff.training.inputs import Inputs
from csdiff.training.interrupts import Interrupt, Stopped
from csdiff.training.loop import Loop, TooManySkipped
from csdiff.training.run_folder import ONLINE, RunFolder
from csdiff.training.samples import Samples
from csdiff.training.state import load_state, save_state, state_bytes
from csdiff.training.validation import Validator

_BASELINE_ROWS = 20_000


class Run:
    """A run with all its parts.

    Args:
        config: The run.
        accelerator: Processes and trackers.
        console: What a person sees.
        folder: Where it goes.
        data: What it trains on.
        inputs: Prepares batches.
        loop: Makes the steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        console: Console,
        folder: RunFolder,
        data: TrainingData,
        inputs: Inputs,
        loop: Loop,
    ):
        self.config, self.accelerator, self.console, self.folder = config, accelerator, console, folder
        self.data, self.inputs, self.loop, self.task = data, inputs, loop, loop.task
        self.main = accelerator.is_main_process
        self.interrupt = Interrupt()
        self.exporter = Exporter(config, data, loop.task, inputs, self.interrupt.pause)
        self.validator: Validator | None = None
        self.samples: Samples | None = None
        self.metrics: dict = {}
        self.measured_at: int | None = None

    def prepare(self) -> None:
        """Read the held-out rows and measure the baselines; the last chance to refuse something."""
        config = self.config.validation
        if self.main and config.decoder is not None:
            self.samples = Samples(self.config, self.exporter, self.interrupt.at_once)
        if not self.main or self.data.validation is None:
            return
        rows = self.inputs.read(self.data.validation.sample(config.limit))
        self.validator = Validator(rows, config.metric, config.mode, self.interrupt.pause)
        progress = self.loop.progress
        if not progress.baselines:
            fitted = self.data.train.sample(_BASELINE_ROWS).all()
            progress.baselines = self.validator.baselines(fitted["text_embeds"], fitted["image_embeds"])
        for metrics in progress.baselines.values():
            self.validator.value(metrics)

    def announce(self, start: Path | None) -> None:
        """Say what is trained, on what, with what."""
        config, data, train, store = self.config, self.data, self.data.train, self.data.store
        weights = sum(p.numel() for p in self.task.parameters.values())
        groups = [f"{len(train):,} pairs"]
        if train.groups is not None:
            groups[0] += f" of {train.epoch_rows:,} images, one caption of each an epoch"
        for name in ("unpaired_text", "unpaired_image"):
            if getattr(data, name) is not None:
                groups.append(f"{len(getattr(data, name)):,} {name.replace('_', ' ')} rows")
        groups.append(f"{0 if data.validation is None else len(data.validation):,} held out")
        precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]
        count = self.accelerator.num_processes
        epochs = config.max_steps * config.batch_size / train.epoch_rows
        self.console.say(
            f"Training {config.adapter} ({weights:,} weights) with {config.objective} on {', '.join(groups)} "
            f"({store.path}, text {store.text_dim}, image {store.image_dim})."
        )
        self.console.say(
            f"{config.max_steps:,} steps of {config.batch_size:,} pairs ({epochs:.1f} epochs) on {count} "
            f"process{'es' if count > 1 else ''}, {self.accelerator.device.type}, {precision}; "
            f"output in {self.folder.path}."
        )
        if start is not None:
            self.console.say(f"Continuing from {start} at step {self.loop.progress.step}.")

    def go(self) -> None:
        """Train to the end.

        Raises:
            CSDiffError: when training has broken down, or a checkpoint finds the disk full.
            SystemExit: after SIGTERM or SIGINT.
        """
        config, progress, interrupt = self.config, self.loop.progress, self.interrupt
        self.console.start(progress.step, config.max_steps)
        earlier, began = progress.seconds, time.perf_counter()
        logged_at, logged_step = began, progress.step
        feed = self._feed()
        try:
            with interrupt.watched():
                if progress.validation_left and self._validate():
                    self._save()
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
                    self.console.advance(progress.step, shown)
                    better = self._due(config.validation.every) and self._validate()
                    stop = not self.task.agree(interrupt.signal is None)
                    last = progress.step == config.max_steps
                    # Steps are being skipped: what comes to the disk now may be what broke, and would push out what
                    # did not.
                    sound = progress.skipped_in_a_row == 0
                    if better or stop or last or (sound and self._due(config.checkpoint.every)):
                        self._save()
                    if stop and (not last or not self.task.agree(not progress.validation_left)):
                        self._stop(interrupt.signal)
        finally:
            self.console.stop()
            feed.close()
        if self.measured_at != progress.step:
            self._validate()

    def _feed(self) -> Iterator[dict]:
        """Endless batches of all groups side by side, on the device."""
        config = self.config
        unpaired = config.data.unpaired_batch_size or config.batch_size
        sizes = {"pairs": config.batch_size, "unpaired_text": unpaired, "unpaired_image": unpaired}
        groups = {"pairs": self.data.train} | {name: getattr(self.data, name) for name in list(sizes)[1:]}
        place = self.accelerator.process_index, self.accelerator.num_processes, self.loop.progress.step
        loaders = {
            name: self.inputs.batches(name, pairs, sizes[name], config.seed, *place)
            for name, pairs in groups.items()
            if pairs is not None
        }
        for parts in zip(*loaders.values(), strict=True):
            yield self.inputs.prepare(dict(zip(loaders, parts, strict=True)))

    def _due(self, every: int) -> bool:
        step = self.loop.progress.step
        return step == self.config.max_steps or (every > 0 and step % every == 0)

    def _step(self, batch: dict) -> dict | None:
        progress = self.loop.progress
        try:
            numbers = self.loop.step(batch)
        except TooManySkipped as error:
            last = self.folder.checkpoints.latest()
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise CSDiffError(
                f"{error}; {good}. Lower --learning_rate, or look for damaged rows in the data."
            ) from None
        if numbers is None:
            self.console.say(f"Step {progress.step} skipped: {self.loop.skip_reason} ({progress.skipped} so far).")
            self._log("skipped", {"reason": self.loop.skip_reason, "skipped": progress.skipped})
        return numbers

    def _log(self, kind: str, numbers: dict) -> None:
        step = self.loop.progress.step
        if self.main:
            self.folder.log(step, kind, numbers)
        flat = {f"{kind}/{k}": v for k, v in flatten(numbers).items() if isinstance(v, (int, float))}
        self.accelerator.log(flat, step=step)

    def _validate(self) -> bool:
        """Draw and measure, unless a signal comes first; whether the averaged weights are the best so far."""
        progress = self.loop.progress
        progress.validation_left = True
        try:
            with self.interrupt.may_leave():
                if self.samples is not None:
                    self.samples.draw(self.folder.path, progress.step, self.accelerator.trackers)
                better = self.validator is not None and self._measure(self.validator)
        except Stopped:
            return False
        progress.validation_left = False
        return better

    def _measure(self, validator: Validator) -> bool:
        progress, step = self.loop.progress, self.loop.progress.step
        measured = {}
        for name in ("average", "online"):
            with self.exporter.weights(step, averaged=name == "average"):
                measured[name] = validator.measure(self.task)
        self.metrics, self.measured_at = measured["average"], step
        self._log("validation", {**measured, "baselines": progress.baselines})
        value = validator.value(self.metrics)
        shown = "not finite" if value is None else f"{value:.4f}"
        self.console.say(f"step {step}: {validator.metric} {shown} on {len(validator.image):,} held-out rows")
        if not validator.better(value, progress.best_value):
            return False
        progress.best_step, progress.best_value = step, value
        return True

    def _save(self) -> None:
        if not self.main:
            return
        loop, progress = self.loop, self.loop.progress
        metrics = self.metrics if self.measured_at == progress.step else {}

        def write(folder: Path) -> None:
            self.exporter.write(folder, progress.step, metrics)
            save_state(folder, self.task, loop.optimizer, loop.scaler, progress)

        self.folder.checkpoints.save(progress.step, write, state_bytes(self.task), progress.best_step)

    def _stop(self, number: int | None) -> None:
        name = signal.Signals(number).name if number else "a signal to another process"
        where = self.folder.checkpoints.path(self.loop.progress.step)
        self.console.stop()
        self.console.say(
            f"Stopped by {name} after step {self.loop.progress.step}; {where} is written, run the same "
            "command to continue."
        )
        raise SystemExit(128 + (number or signal.SIGTERM))

    def finish(self) -> dict:
        """Export the adapter to the output folder and show how it did; returns its held-out metrics."""
        progress, say = self.loop.progress, self.console.say
        if not self.main:
            return self.metrics
        step, metrics = progress.step, self.metrics
        if self.config.export == "best" and progress.best_step is None:
            say("No validation gave a finite value that tells the best checkpoint: the last step is exported.")
        elif self.config.export == "best" and progress.best_step != step:
            step = progress.best_step
            best = self.folder.checkpoints.path(step)
            load_state(best, self.task, self.loop.optimizer, self.loop.scaler)
            metrics = read_json(best / "csdiff.json").get("metrics") or {}
        self.exporter.write(self.folder.path, step, metrics)
        self.exporter.write(self.folder.path / ONLINE, step, metrics, averaged=False)
        if metrics:
            self.console.table(f"step {step}, held out", {**progress.baselines, "adapter": metrics})
        notes = [f"{self.config.batch_size * progress.step / max(progress.seconds, 1e-9):,.0f} samples/s"]
        if progress.best_step:
            notes.append(f"best {self.validator.metric} {progress.best_value:.4f} at step {progress.best_step}")
        if progress.skipped:
            notes.append(f"{progress.skipped} steps skipped")
        say(f"Trained for {duration(progress.seconds)} ({', '.join(notes)}).")
        if step == progress.step and progress.best_step not in (None, step):
            say(f"To export step {progress.best_step} instead, run the same command with --export best.")
        say(f"Adapter: {self.folder.path} (step {step})")
        return metrics
