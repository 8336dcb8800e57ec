"""The course of a run: steps, validations, checkpoints, and what is said about them."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.files import flatten
from csdiff.training.console import Console, duration
from csdiff.training.curves import CURVES_NAME, draw_curves
from csdiff.training.export import Exporter
from csdiff.training.interrupts import Interrupt, Stopped
from csdiff.training.loop import Loop, Throughput, TooManySkipped, batches
from csdiff.training.recipe import run_options
from csdiff.training.run_folder import ONLINE, RunFolder
from csdiff.training.samples import Samples, draw_sheet
from csdiff.training.state import load_state, save_state, state_bytes
from csdiff.training.validation import Validator

_BASELINE_ROWS = 20_000


class Run:
    """Everything of a run, ready to go.

    Args:
        config: The run.
        accelerator: Processes and trackers.
        console: What a person sees.
        folder: Where it goes.
        sources: The data.
        inputs: Prepares batches.
        loop: Makes the steps.
        exporter: Writes adapters.
        interrupt: Signals.
    """

    def __init__(
        self,
        config,
        accelerator,
        console: Console,
        folder: RunFolder,
        sources,
        inputs,
        loop: Loop,
        exporter: Exporter,
        interrupt: Interrupt,
    ):
        self.config, self.accelerator, self.console, self.folder = config, accelerator, console, folder
        self.sources, self.inputs, self.loop, self.exporter = sources, inputs, loop, exporter
        self.interrupt = interrupt
        self.task = loop.task
        self.validator: Validator | None = None
        self.samples: Samples | None = None
        self.metrics: dict = {}
        self._next_drawing = time.perf_counter() + 20

    @property
    def main(self) -> bool:
        """Whether this is the main process, which validates and writes."""
        return self.accelerator.is_main_process

    def prepare(self) -> None:
        """Read the held-out rows and measure the baselines; the last chance to refuse something."""
        config = self.config.validation
        if not self.main:
            return
        if config.decoder is not None:
            self.samples = Samples(self.config, self.exporter, self.interrupt.at_once)
        if self.sources.validation is None:
            return
        rows = self.inputs.read(self.sources.validation.sample(config.limit))
        self.validator = Validator(rows, config.metric, config.mode, self.interrupt.pause)
        progress = self.loop.progress
        if not progress.baselines:
            fitted = self.sources.train.sample(_BASELINE_ROWS).all()
            progress.baselines = self.validator.baselines(fitted["text_embeds"], fitted["image_embeds"])
        for metrics in progress.baselines.values():
            self.validator.value(metrics)

    def announce(self, start) -> None:
        """Say what is trained, on what, with what."""
        config, say = self.config, self.console.say
        weights = sum(p.numel() for p in self.task.parameters.values())
        store = self.sources.store
        held_out = 0 if self.sources.validation is None else len(self.sources.validation)
        extra = "".join(
            f", {len(pairs):,} {name.replace('_', ' ')} rows"
            for name, pairs in (
                ("unpaired_text", self.sources.unpaired_text),
                ("unpaired_image", self.sources.unpaired_image),
            )
            if pairs is not None
        )
        train = self.sources.train
        pictures = "" if train.groups is None else f" of {train.epoch_rows:,} pictures, one caption of each an epoch"
        precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]
        processes = self.accelerator.num_processes
        say(
            f"Training {config.adapter} ({weights:,} weights) with {config.objective} on "
            f"{len(train):,} pairs{pictures}{extra}, {held_out:,} held out ({store.path}, "
            f"text {store.text_dim}, image {store.image_dim})."
        )
        say(
            f"{config.max_steps:,} steps of {config.batch_size:,} pairs "
            f"({config.max_steps * config.batch_size / train.epoch_rows:.1f} epochs) on {processes} "
            f"process{'es' if processes > 1 else ''}, {self.accelerator.device.type}, {precision}; "
            f"output in {self.folder.path}."
        )
        if chosen := {k: v for k, v in run_options(config, self.sources).items() if k not in config.objective_options}:
            say("Options of the objective for these data: " + ", ".join(f"{k} {v}" for k, v in chosen.items()) + ".")
        if start is not None:
            say(f"Continuing from {start} at step {self.loop.progress.step}.")

    def go(self) -> dict:
        """Train to the end; returns the last validation.

        Raises:
            CSDiffError: when training has broken down, or a checkpoint finds the disk full.
            SystemExit: after SIGTERM or SIGINT.
        """
        config, progress = self.config, self.loop.progress
        self.console.start(progress.step, config.max_steps)
        throughput, earlier, began = Throughput(config.batch_size), progress.seconds, time.perf_counter()
        feed, interrupt = self._feed(), self.interrupt
        try:
            with interrupt.watched():
                if progress.validation_left and self._validate():
                    self._save()
                while progress.step < config.max_steps:
                    numbers = self._step(next(feed))
                    progress.seconds = earlier + time.perf_counter() - began
                    throughput.count()
                    if self._due(config.logging.every) and numbers is not None:
                        shown = {name: float(value) for name, value in numbers.items()}
                        self._log("train", shown | {"samples_per_second": throughput.rate()})
                        self.console.advance(progress.step, shown, throughput.last)
                    else:
                        self.console.advance(progress.step, None, None)
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
        if not self.metrics:
            self._validate()
        return self.metrics

    def _feed(self) -> Iterator[dict]:
        config, progress = self.config, self.loop.progress
        unpaired = config.data.unpaired_batch_size or config.batch_size
        groups = {
            "pairs": (self.sources.train, config.batch_size),
            "unpaired_text": (self.sources.unpaired_text, unpaired),
            "unpaired_image": (self.sources.unpaired_image, unpaired),
        }
        process = self.accelerator.process_index, self.accelerator.num_processes
        loaders = {
            group: self.inputs.batches(group, pairs, size, config.seed, *process, progress.step)
            for group, (pairs, size) in groups.items()
            if pairs is not None
        }
        return batches(loaders, self.inputs.prepare)

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
                    self.samples.draw(self.folder.path, progress.step)
                better = self.validator is not None and self._measure(self.validator)
        except Stopped:
            return False
        progress.validation_left = False
        self._draw()
        return better

    def _measure(self, validator: Validator) -> bool:
        progress, step = self.loop.progress, self.loop.progress.step
        with self.exporter.weights(step, averaged=True):
            average = validator.measure(self.task)
        with self.exporter.weights(step, averaged=False):
            online = validator.measure(self.task)
        self.metrics = average
        self._log("validation", {"average": average, "online": online, "baselines": progress.baselines})
        value = validator.value(average)
        shown = "not finite" if value is None else f"{value:.4f}"
        self.console.say(f"step {step}: {validator.metric} {shown} on {len(validator.image):,} held-out rows")
        if not validator.better(value, progress.best_value):
            return False
        progress.best_step, progress.best_value = step, value
        return True

    def _draw(self, now: bool = False) -> None:
        """Curves and the sheet of pictures; a run does not end because they cannot be drawn, nor wait for them."""
        began = time.perf_counter()
        if not (self.main and self.config.logging.curves) or (began < self._next_drawing and not now):
            return
        try:
            draw_curves(self.folder.path)
            if self.samples is not None:
                draw_sheet(self.folder.path, self.config.validation.prompts, self.config.seed)
        except Exception as error:
            self.console.say(f"{CURVES_NAME} could not be drawn ({type(error).__name__}: {error}); the run goes on.")
        # A twentieth of the time at most.
        self._next_drawing = time.perf_counter() + 20 * (time.perf_counter() - began)

    def _save(self) -> None:
        if not self.main:
            return
        loop, progress = self.loop, self.loop.progress

        def write(folder: Path) -> None:
            self.exporter.write(folder, progress.step, self.metrics)
            save_state(folder, self.task, loop.optimizer, loop.scaler.state_dict() or None, progress)

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
        self._draw(now=True)
        step, metrics = progress.step, self.metrics
        if self.config.export == "best" and progress.best_step not in (None, step):
            step = progress.best_step
            best = self.folder.checkpoints.path(step)
            load_state(best, self.task, self.loop.optimizer)
            metrics = json.loads((best / "csdiff.json").read_text(encoding="utf-8"))["metrics"]
        self.exporter.write(self.folder.path, step, metrics)
        self.exporter.write(self.folder.path / ONLINE, step, metrics, averaged=False)
        if metrics:
            self.console.table(f"step {step}, held out", {**progress.baselines, "adapter": metrics})
        rate = self.config.batch_size * progress.step / max(progress.seconds, 1e-9)
        best = (
            f", best {self.validator.metric} {progress.best_value:.4f} at step {progress.best_step}"
            if progress.best_step
            else ""
        )
        skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
        say(f"Trained for {duration(progress.seconds)} ({rate:,.0f} samples/s{best}{skipped}).")
        if step == progress.step and progress.best_step not in (None, step):
            say(f"To export step {progress.best_step} instead, run the same command with --export best.")
        say(f"Adapter: {self.folder.path} (step {step})")
        return metrics
