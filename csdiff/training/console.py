"""What a person sees while an adapter is trained."""

import io
import sys
import time

from tqdm import tqdm

from csdiff.evaluation.metrics import BASELINES, MAIN, metric, metric_rows
from csdiff.tables import text_table

# Seconds between the progress lines of a log file.
_PAUSE = 10
# Held-out rows below which retrieval says little.
_FEW = 200


class Console:
    """Lines, and progress: a bar on a terminal, that bar as a line now and then in a log file; of `main` only."""

    def __init__(self, main: bool, progress: bool = True):
        self.main, self.progress, self.terminal = main, progress and main, sys.stderr.isatty()
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total: int) -> None:
        shown = {"dynamic_ncols": True} if self.terminal else {"file": io.StringIO(), "mininterval": _PAUSE}
        options = {"desc": "training", "unit": "step", "disable": not self.progress, **shown}
        self.bar, self._said = tqdm(total=total, initial=step, **options), time.monotonic()

    def advance(self, shown: dict[str, float] | None) -> None:
        """One step done; `shown` are the numbers of a logged step."""
        if not self.progress:
            return
        self.bar.update()
        if shown is not None:
            formats = {"samples_per_second": ",.0f"}
            numbers = {name: f"{value:{formats.get(name, '.3g')}}" for name, value in shown.items()}
            self.bar.set_postfix(numbers, refresh=False)
        # The tenth step tells how long the run will take.
        due = self.bar.n == self.bar.initial + 10 or (shown is not None and time.monotonic() - self._said > _PAUSE)
        if due and not self.terminal:
            self._said = time.monotonic()
            self.say(str(self.bar))

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def table(self, title: str, columns: dict[str, dict]) -> None:
        """Metrics side by side, one column a model; `columns` holds nested metrics by name."""
        shown = [metric(key) for key in (*MAIN, "cs_divergence", "norm.mean_ratio", "norm.std_ratio")]
        count = max(metrics.get("count", 0) for metrics in columns.values())
        few = " (few: read with care)" if count < _FEW else ""
        columns = {BASELINES.get(name, name): metrics for name, metrics in columns.items()}
        head = [f"{title}, {count:,} rows{few}", "better", *columns]
        self.say(f"\n{text_table(head, metric_rows(columns, shown))}\n")
