"""Long work behind the page: in a thread that reports and can be stopped, one after the other, with the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from PIL import Image

from csdiff.errors import CSDiffError

Report = Callable[[Any], None]


@dataclass(frozen=True)
class Progress:
    """A few words on how far the work is, done of total, and perhaps the image as it is now."""

    text: str
    done: int = 0
    total: int = 0
    preview: Image.Image | None = None


class Stopped(Exception):
    """Raised inside the work when its listener has gone or wants no more."""


def stream(work: Callable[[Report], None], stopped: Callable[[], bool] = lambda: False) -> Iterator[Any]:
    """Runs `work(report)` in a thread and yields what it reports.

    Closing the iterator (someone closed the page) makes the next `report` raise `Stopped` and waits for the thread to
    end, so that nothing is left running. So does `stopped()`, which is asked at every report.

    Raises:
        Stopped: when `stopped()` was true at a report.
        Exception: what `work` raised.
    """
    messages: SimpleQueue = SimpleQueue()
    closing = threading.Event()

    def report(message: Any) -> None:
        if closing.is_set() or stopped():
            raise Stopped
        messages.put((message, None))

    def run() -> None:
        try:
            work(report)
            messages.put((None, StopIteration()))
        except BaseException as error:
            messages.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            message, end = messages.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield message
    finally:
        closing.set()
        thread.join()


@dataclass(eq=False)
class _Ticket:
    steps: int


@dataclass
class Line:
    """Whoever uses the models waits in line for them, and is told the place and about how long it takes.

    Attributes:
        most: How many may wait.
    """

    most: int = 32
    _tickets: list[_Ticket] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _seconds: float | None = None

    @contextmanager
    def turn(self, report: Report, steps: int = 0) -> Iterator[Callable[[int], str]]:
        """Waits until the models are free; while waiting `report` is told, and may raise to give up.

        Args:
            report: Is told of the place in line every half second.
            steps: Denoising steps that the work will take.

        Yields:
            A function that is called with the number of steps done and returns the time left in words.

        Raises:
            CSDiffError: too many wait already.
        """
        ticket = _Ticket(steps)
        with self._changed:
            if len(self._tickets) > self.most:
                raise CSDiffError(f"{self.most} drawings wait already; try again in a moment.")
            self._tickets.append(ticket)
        try:
            while True:
                with self._changed:
                    ahead = self._tickets[: self._tickets.index(ticket)]
                    if not ahead:
                        break
                    self._changed.wait(0.5)
                report(Progress(f"Waiting: {len(ahead)} before you{self._left(sum(t.steps for t in ahead))}"))
            began = time.monotonic()

            def count(done: int) -> str:
                ticket.steps = steps - done
                # The first step of a model is slower than the rest; two are an estimate.
                if done >= 2:
                    self._seconds = (time.monotonic() - began) / done
                return self._left(ticket.steps)

            yield count
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _left(self, steps: int) -> str:
        if not steps or self._seconds is None:
            return ""
        seconds = steps * self._seconds
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {max(1, round(seconds))} s left"
