"""SIGTERM and SIGINT as a wish to stop after the step at hand."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Remembers the first signal; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @contextmanager
    def watched(self) -> Iterator["Interrupt"]:
        """Listen within a block. Outside the main thread signals cannot be handled and keep their meaning."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        except ValueError:
            pass
        try:
            yield self
        finally:
            self._restore()

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
