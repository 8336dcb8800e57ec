"""What a person sees while an adapter is trained."""

import sys
import time

from tqdm import tqdm

from csdiff.evaluation.metrics import MAIN, metric, metric_rows
from csdiff.tables import text_table


class Console:
    """Lines, a progress bar on a terminal, plain progress lines in a log file; of the `main` process only."""

    def __init__(self, main: bool, progress: bool = True):
        self.main, self.progress = main, progress and main
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total: int) -> None:
        """Begin progress at a step."""
        self._first, self._total, self._began, self._last = step, total, time.perf_counter(), time.perf_counter()
        if self.progress and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=step, desc="training", unit="step", dynamic_ncols=True)

    def advance(self, step: int, shown: dict[str, float] | None) -> None:
        """One step done; `shown` are the numbers of a logged step."""
        formats = {"samples_per_second": ",.0f"}
        numbers = {name: f"{value:{formats.get(name, '.3g')}}" for name, value in (shown or {}).items()}
        now = time.perf_counter()
        left = duration((now - self._began) / (step - self._first) * (self._total - step))
        if self.bar is not None:
            self.bar.update(1)
            if numbers:
                self.bar.set_postfix(numbers, refresh=False)
        elif self.progress and step == self._first + 10:
            self.say(f"About {left} to go.")
        elif self.progress and shown is not None and now - self._last > 10:
            self._last = now
            terms = "  ".join(f"{name} {value}" for name, value in numbers.items())
            self.say(f"step {step}/{self._total}  {terms}  {left} left")

    def stop(self) -> None:
        """End progress."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def table(self, title: str, columns: dict[str, dict]) -> None:
        """Metrics side by side, one column a model; `columns` holds nested metrics by name."""
        shown = [metric(key) for key in (*MAIN, "cs_divergence", "norm.mean_ratio", "norm.std_ratio")]
        count = max(metrics.get("count", 0) for metrics in columns.values())
        head = [f"{title}, {count:,} rows", "better", *columns]
        self.say(f"\n{text_table(head, metric_rows(columns, shown))}\n")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
