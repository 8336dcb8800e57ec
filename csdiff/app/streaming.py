"""Long work in a thread of its own that reports as it goes and stops when nobody listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

Report = Callable[[Any], None]


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
    stopping = threading.Event()

    def report(message: Any) -> None:
        if stopping.is_set() or stopped():
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
        stopping.set()
        thread.join()
